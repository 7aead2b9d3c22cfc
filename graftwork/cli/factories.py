"""What names mean on the command line: recipes, PEFT methods, executors."""

import functools
from collections.abc import Callable
from typing import Any, Optional

import nemo_run as run

from graftwork import executors
from graftwork.peft import IA3, PEFT, CanonicalAdapter, LoRA, PTuning
from graftwork.recipes import RECIPES
from graftwork.training import finetune

METHODS: dict[str, type[PEFT]] = {
    "lora": LoRA,
    "canonical_adapter": CanonicalAdapter,
    "ia3": IA3,
    "ptuning": PTuning,
}
"""Every PEFT method by the name that ``peft=[NAME(...)]`` takes."""


def register() -> None:
    """Register recipes under ``--factory``, methods under ``peft=`` and executors under ``run.executor=``."""
    for name, recipe in RECIPES.items():
        run.cli.factory(_named(recipe.finetune_recipe, name), target=finetune)
    for name, method in METHODS.items():
        run.cli.factory(_named(_config_of(method), name), target=PEFT)
    run.cli.factory(_local, target=run.LocalExecutor, name="local")


def _config_of(method: type[PEFT]) -> Callable[..., run.Config]:
    @functools.wraps(method, updated=())
    def make(**arguments: Any) -> run.Config:
        return run.Config(method, **arguments)

    return make


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def named(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    named.__name__ = named.__qualname__ = name
    return named


def _local(ntasks: int = 1, launcher: Optional[str] = None) -> run.Config:
    return executors.local(ntasks, launcher).to_config()


_local.__name__ = "local"
