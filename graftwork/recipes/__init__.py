"""Recipes: one module per base model, each with ``model()``, ``trainer()`` and ``finetune_recipe()``; show and diff."""

from types import ModuleType

from graftwork.recipes import (
    gpt2_124m,
    gpt3_175b,
    llama2_7b,
    llama2_13b,
    llama2_70b,
    llama3_8b,
    llama3_70b,
    nemotron3_8b,
    nemotron4_340b,
    smollm2_135m,
)
from graftwork.recipes.show import diff, show

RECIPES: dict[str, ModuleType] = {
    "smollm2_135m": smollm2_135m,
    "gpt2_124m": gpt2_124m,
    "gpt3_175b": gpt3_175b,
    "llama2_7b": llama2_7b,
    "llama2_13b": llama2_13b,
    "llama2_70b": llama2_70b,
    "llama3_8b": llama3_8b,
    "llama3_70b": llama3_70b,
    "nemotron3_8b": nemotron3_8b,
    "nemotron4_340b": nemotron4_340b,
}
"""Every recipe module by the name that ``--factory`` takes."""

__all__ = ["RECIPES", *RECIPES, "diff", "show"]
