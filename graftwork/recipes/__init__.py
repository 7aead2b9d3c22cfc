"""Recipes: a module or object per base model, with ``model()``, ``trainer()``, ``finetune_recipe()``; show, diff, grid.

What several recipes share is in ``parts``; where a recipe runs, in ``graftwork.executors``.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Optional, Protocol

import nemo_run as run

from graftwork.recipes.grid import grid
from graftwork.recipes.show import diff, show
from graftwork.registry import Registry

if TYPE_CHECKING:
    from graftwork.peft import PEFT
    from graftwork.recipes import auto
    from graftwork.recipes.files import load, save
    from graftwork.recipes.planning import plan


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
        peft: "Optional[list[PEFT]]" = None,
    ) -> run.Partial:
        """Return the whole recipe; its docstring says what it is for and why its sizes are so."""


RECIPES: Registry[Recipe] = Registry("recipe")
"""Every recipe by the name that ``--factory`` takes; its module, and with it lightning, is imported when it is read."""

for _name in (
    "smollm2_135m", "gpt2_124m", "gpt3_175b", "llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_70b",
    "llama31_8b", "llama32_1b", "llama32_3b", "mistral_7b", "qwen2_5_7b", "qwen3_0_6b", "qwen3_8b",
    "minitron_4b", "nemotron3_8b", "nemotron4_340b", "mixtral_8x7b", "qwen3_30b_a3b",
):  # fmt: skip
    RECIPES.enter_place(_name, f"graftwork.recipes.{_name}")
for _name in (
    "t5_small", "t5_base", "t5_large", "t5_3b", "t5_11b",
    "t5v11_small", "t5v11_base", "t5v11_large", "t5v11_xl", "t5v11_xxl",
    "mt5_small", "mt5_base", "mt5_large", "mt5_xl", "mt5_xxl",
):  # fmt: skip
    RECIPES.enter_place(_name, f"graftwork.recipes.t5:{_name}")

AUTO = "auto"
"""The factory of any other base, ``auto(base=...)``: a recipe of nobody, so that it is none of RECIPES."""

__all__ = ["AUTO", "RECIPES", "Recipe", *RECIPES, "auto", "diff", "grid", "load", "plan", "save", "show"]


_PLACES = {
    AUTO: "graftwork.recipes.auto",
    "load": "graftwork.recipes.files:load",
    "save": "graftwork.recipes.files:save",
    "plan": "graftwork.recipes.planning:plan",
}
"""What needs lightning too, and is imported when it is asked for."""


def __getattr__(name: str) -> object:
    if name in RECIPES:
        return RECIPES[name]
    if name in _PLACES:
        return resolve_name(_PLACES[name])
    raise AttributeError(f"graftwork.recipes has no {name!r}")
