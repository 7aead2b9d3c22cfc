"""Named shapes: the published hyper-parameters of each base model, one plain function per name.

What a shape is stands in ``models.shape``; how a checkpoint's config becomes one, in ``models.weights.hf``.
"""

from graftwork.models.shape import Shape
from graftwork.models.shapes.gpt import gpt2_124m, gpt3_175b
from graftwork.models.shapes.llama import (
    llama2_7b,
    llama2_13b,
    llama2_70b,
    llama3_8b,
    llama3_70b,
    llama31_8b,
    llama32_1b,
    llama32_3b,
    smollm2_135m,
)
from graftwork.models.shapes.mistral import mistral_7b
from graftwork.models.shapes.mixtures import mixtral_8x7b, qwen3_30b_a3b
from graftwork.models.shapes.nemotron import minitron_4b, nemotron3_8b, nemotron4_340b
from graftwork.models.shapes.qwen import qwen2_5_7b, qwen3_0_6b, qwen3_8b
from graftwork.models.shapes.t5 import (
    mt5_base,
    mt5_large,
    mt5_small,
    mt5_xl,
    mt5_xxl,
    t5_3b,
    t5_11b,
    t5_base,
    t5_large,
    t5_small,
    t5v11_base,
    t5v11_large,
    t5v11_small,
    t5v11_xl,
    t5v11_xxl,
)
from graftwork.models.t5_shape import T5Shape

__all__ = [
    "Shape",
    "T5Shape",
    "gpt2_124m",
    "gpt3_175b",
    "llama2_7b",
    "llama2_13b",
    "llama2_70b",
    "llama3_8b",
    "llama3_70b",
    "llama31_8b",
    "llama32_1b",
    "llama32_3b",
    "minitron_4b",
    "mistral_7b",
    "mixtral_8x7b",
    "mt5_base",
    "mt5_large",
    "mt5_small",
    "mt5_xl",
    "mt5_xxl",
    "nemotron3_8b",
    "nemotron4_340b",
    "qwen2_5_7b",
    "qwen3_0_6b",
    "qwen3_8b",
    "qwen3_30b_a3b",
    "smollm2_135m",
    "t5_3b",
    "t5_11b",
    "t5_base",
    "t5_large",
    "t5_small",
    "t5v11_base",
    "t5v11_large",
    "t5v11_small",
    "t5v11_xl",
    "t5v11_xxl",
]
