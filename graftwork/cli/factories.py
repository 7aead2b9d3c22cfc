"""What names mean on the command line: every recipe, that of any base, PEFT method and executor of the registries."""

import functools
from collections.abc import Callable

import nemo_run as run

from graftwork.executors import EXECUTORS
from graftwork.peft import METHODS, PEFT
from graftwork.recipes import AUTO, RECIPES, auto
from graftwork.training import finetune


def register() -> None:
    """Register recipes under ``--factory``, methods under ``peft=`` and executors under ``run.executor=``."""
    for name, recipe in RECIPES.items():
        run.cli.factory(_named(recipe.finetune_recipe, name), target=finetune)
    run.cli.factory(_named(auto.finetune_recipe, AUTO), target=finetune)
    for method in METHODS.values():
        run.cli.factory(_named(_config_of(method), method.short_name()), target=PEFT)
    for name, executor in EXECUTORS.items():
        run.cli.factory(_named(_config_of(executor), name), target=run.Executor)


def _config_of(made: Callable[..., object]) -> Callable[..., run.Config]:
    """Return what configures a method or an executor: the fields of its call, not of what it returns."""

    @functools.wraps(made, updated=())
    def make(*arguments: object, **options: object) -> run.Config:
        return run.Config(made, *arguments, **options)

    return make


def _named(function: Callable[..., run.Config], name: str) -> Callable[..., run.Config]:
    @functools.wraps(function)
    def named(*arguments: object, **options: object) -> run.Config:
        return function(*arguments, **options)

    named.__name__ = named.__qualname__ = name
    return named
