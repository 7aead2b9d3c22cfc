"""Patches of megatron-core: importing this package makes it run on machines without CUDA. Nothing of our own is here.

Every module that touches megatron-core imports ``graftwork.compat`` first: megatron-core binds compiled functions
and autocast devices while it is being imported, so the accommodations must already be in place.
"""

from graftwork.compat import cpu, recompute

cpu.install()
recompute.install()

from graftwork.compat import frozen_linear  # noqa: E402  # derives from a class of megatron-core, prepared by now

frozen_linear.install()
