"""Hugging Face families, one file each: what it answers to, how its config reads and is written, its mapping.

A new family is a file here and a line below. What all families share stands in ``family``, ``llama_like``,
``mixture_like``, ``qwen_moe_like``, ``rope`` and ``rules``; nothing here opens a weights file.
"""

from graftwork.models.weights.hf.family import (
    FAMILIES,
    Config,
    Family,
    check_architecture,
    family_named,
    family_of,
    family_table,
    hf_config,
    mapping_for,
    read_config,
    shape_from_hf,
)
from graftwork.models.weights.hf.gpt2 import GPT2
from graftwork.models.weights.hf.llama import Llama
from graftwork.models.weights.hf.mistral import Mistral
from graftwork.models.weights.hf.mixtral import Mixtral
from graftwork.models.weights.hf.mt5 import MT5
from graftwork.models.weights.hf.nemotron import Nemotron
from graftwork.models.weights.hf.phi3 import Phi3
from graftwork.models.weights.hf.qwen2 import Qwen2
from graftwork.models.weights.hf.qwen2_moe import Qwen2MoE
from graftwork.models.weights.hf.qwen3 import Qwen3
from graftwork.models.weights.hf.qwen3_moe import Qwen3MoE
from graftwork.models.weights.hf.t5 import T5

for _family in (
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    GPT2(),
    Nemotron(),
    Phi3(),
    Mixtral(),
    Qwen3MoE(),
    Qwen2MoE(),
    T5(),
    MT5(),
):
    FAMILIES.enter(_family.name, _family)

__all__ = [
    "FAMILIES",
    "Config",
    "Family",
    "check_architecture",
    "family_named",
    "family_of",
    "family_table",
    "hf_config",
    "mapping_for",
    "read_config",
    "shape_from_hf",
]
