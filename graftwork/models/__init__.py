"""Base models as LightningModules over megatron-core, in one form for Hugging Face checkpoints of every family.

Here belongs what a base is, holds and says: its shape, weights, tokens, loss. No training loop, no file of rows.
"""

import graftwork.compat  # noqa: F401  # before any other megatron import
from graftwork.models.base import Model
from graftwork.models.gpt import GPT
from graftwork.models.load import MODELS, load
from graftwork.models.t5 import T5

for _kind in (GPT, T5):
    MODELS.enter(_kind.kind, _kind)

__all__ = ["GPT", "MODELS", "T5", "Model", "load"]
