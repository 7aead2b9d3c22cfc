"""The one seam to megatron-core's models: layers, attention, specifications and the modules built from them.

Here belongs arithmetic inside a transformer. No checkpoint, no adapter, no trainer.
"""

import graftwork.compat  # noqa: F401  # before any other megatron import
from graftwork.compat import frozen_linear, gated, recompute, rotary

recompute.install()
frozen_linear.install()
gated.install()
rotary.install()
