"""Recipes: a module or object per base model, with ``model()``, ``trainer()``, ``finetune_recipe()``; show and diff.

What several recipes share is in ``parts``; where a recipe runs, in ``graftwork.executors``.
"""

from typing import Optional, Protocol

import nemo_run as run

from graftwork.peft import PEFT
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
from graftwork.recipes.t5 import (
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
from graftwork.registry import Registry


class Recipe(Protocol):
    """What the module of a base model offers, or one of the objects of a module for several."""

    def model(self) -> run.Config:
        """Return the base model."""

    def trainer(
        self, dir: str = "runs", name: str = "default", num_nodes: int = 1, num_gpus_per_node: int = 1
    ) -> run.Config:
        """Return the trainer that writes to ``dir/name``."""

    def finetune_recipe(
        self,
        dir: str = "runs",
        name: str = "default",
        num_nodes: int = 1,
        num_gpus_per_node: int = 1,
        peft: Optional[list[PEFT]] = None,
    ) -> run.Partial:
        """Return the whole recipe; its docstring says what it is for and why its sizes are so."""


RECIPES: Registry[Recipe] = Registry("recipe")
"""Every recipe by the name that ``--factory`` takes."""

RECIPES.enter("smollm2_135m", smollm2_135m)
RECIPES.enter("gpt2_124m", gpt2_124m)
RECIPES.enter("gpt3_175b", gpt3_175b)
RECIPES.enter("llama2_7b", llama2_7b)
RECIPES.enter("llama2_13b", llama2_13b)
RECIPES.enter("llama2_70b", llama2_70b)
RECIPES.enter("llama3_8b", llama3_8b)
RECIPES.enter("llama3_70b", llama3_70b)
RECIPES.enter("nemotron3_8b", nemotron3_8b)
RECIPES.enter("nemotron4_340b", nemotron4_340b)
RECIPES.enter("t5_small", t5_small)
RECIPES.enter("t5_base", t5_base)
RECIPES.enter("t5_large", t5_large)
RECIPES.enter("t5_3b", t5_3b)
RECIPES.enter("t5_11b", t5_11b)
RECIPES.enter("t5v11_small", t5v11_small)
RECIPES.enter("t5v11_base", t5v11_base)
RECIPES.enter("t5v11_large", t5v11_large)
RECIPES.enter("t5v11_xl", t5v11_xl)
RECIPES.enter("t5v11_xxl", t5v11_xxl)
RECIPES.enter("mt5_small", mt5_small)
RECIPES.enter("mt5_base", mt5_base)
RECIPES.enter("mt5_large", mt5_large)
RECIPES.enter("mt5_xl", mt5_xl)
RECIPES.enter("mt5_xxl", mt5_xxl)

__all__ = ["RECIPES", "Recipe", *RECIPES, "diff", "show"]
