"""PEFT methods as transforms: each wraps modules of a frozen megatron-core model and trains only what it adds."""

import graftwork.compat  # noqa: F401  # before any other megatron import
from graftwork.peft.method import PEFT
from graftwork.peft.methods.canonical_adapter import CanonicalAdapter
from graftwork.peft.methods.ia3 import IA3
from graftwork.peft.methods.lora import LoRA
from graftwork.peft.methods.prompt import PTuning

METHODS: dict[str, type[PEFT]] = {m.__name__: m for m in (LoRA, CanonicalAdapter, IA3, PTuning)}
"""Every method by class name; an artifact names its methods so."""

__all__ = ["IA3", "METHODS", "PEFT", "CanonicalAdapter", "LoRA", "PTuning"]
