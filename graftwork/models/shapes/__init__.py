"""Named shapes: the published hyper-parameters of each base model, one plain function per name.

What a shape is stands in ``models.shape``; how a checkpoint's config becomes one, in ``models.weights.hf``.
"""

from graftwork.models.shape import Shape
from graftwork.models.shapes.gpt import gpt2_124m, gpt3_175b
from graftwork.models.shapes.llama import llama2_7b, llama2_13b, llama2_70b, llama3_8b, llama3_70b, smollm2_135m
from graftwork.models.shapes.nemotron import nemotron3_8b, nemotron4_340b

__all__ = [
    "Shape",
    "gpt2_124m",
    "gpt3_175b",
    "llama2_7b",
    "llama2_13b",
    "llama2_70b",
    "llama3_8b",
    "llama3_70b",
    "nemotron3_8b",
    "nemotron4_340b",
    "smollm2_135m",
]
