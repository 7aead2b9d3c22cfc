"""Base models as LightningModules over megatron-core."""

import graftwork.compat  # noqa: F401  # before any other megatron import
from graftwork.models.gpt import GPT
from graftwork.models.load import load

__all__ = ["GPT", "load"]
