"""The methods, one file each and one line in the registry; what all of them share belongs one floor up.

An artifact names a method by its class, the command line by ``short_name()``.
"""

from graftwork.peft.method import PEFT
from graftwork.peft.methods.canonical_adapter import CanonicalAdapter
from graftwork.peft.methods.canonical_lora import CanonicalLoRA
from graftwork.peft.methods.dora import DoRA
from graftwork.peft.methods.ia3 import IA3
from graftwork.peft.methods.lora import LoRA
from graftwork.peft.methods.prompt_tuning import PromptTuning
from graftwork.peft.methods.ptuning import PTuning
from graftwork.peft.methods.selective import Selective
from graftwork.registry import Registry

METHODS: Registry[type[PEFT]] = Registry("PEFT method")
"""Every method by the name of its class."""

METHODS.enter("LoRA", LoRA)
METHODS.enter("CanonicalAdapter", CanonicalAdapter)
METHODS.enter("IA3", IA3)
METHODS.enter("PTuning", PTuning)
METHODS.enter("PromptTuning", PromptTuning)
METHODS.enter("Selective", Selective)
METHODS.enter("DoRA", DoRA)
METHODS.enter("CanonicalLoRA", CanonicalLoRA)
