"""PEFT methods as transforms: each wraps modules of a frozen megatron-core model and trains only what it adds or names.

Here belongs what is the same for every base model: adapters, where they go, how they are stacked, kept and merged. No
model, no data, no training loop.
"""

import graftwork.compat  # noqa: F401  # before any other megatron import
from graftwork.peft.method import PEFT
from graftwork.peft.methods import METHODS
from graftwork.peft.methods.canonical_adapter import CanonicalAdapter
from graftwork.peft.methods.canonical_lora import CanonicalLoRA
from graftwork.peft.methods.dora import DoRA
from graftwork.peft.methods.ia3 import IA3
from graftwork.peft.methods.lora import LoRA
from graftwork.peft.methods.prompt_tuning import PromptTuning
from graftwork.peft.methods.ptuning import PTuning
from graftwork.peft.methods.selective import Selective

__all__ = [
    "IA3",
    "METHODS",
    "PEFT",
    "CanonicalAdapter",
    "CanonicalLoRA",
    "DoRA",
    "LoRA",
    "PTuning",
    "PromptTuning",
    "Selective",
]
