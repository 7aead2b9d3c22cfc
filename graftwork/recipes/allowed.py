"""What a recipe may name: its own parts. A file may come from a stranger and must not choose what is imported."""

import importlib
import os
from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers

from graftwork.data import SFTDataModule
from graftwork.errors import ConfigError, quoted, suggest
from graftwork.inference import evaluate, generate
from graftwork.models import MODELS, shapes
from graftwork.optim import AdamW
from graftwork.peft import METHODS
from graftwork.recipes.show import callable_name
from graftwork.training import MegatronStrategy, callbacks, finetune

TRUST = "GRAFTWORK_TRUST_RECIPES"
"""The environment variable that lets recipe files name any code."""

TRUSTED = f"If the file is yours, {TRUST}=1 allows it."


def trusting() -> bool:
    """Whether the user has said that recipe files may name any code."""
    return os.environ.get(TRUST) == "1"


def targets() -> dict[str, Callable[..., object]]:
    """Return the parts of a recipe, callbacks, two loggers and the verbs, by the names that files may use for them.

    Texts name a method by its room, files that NeMo Run writes by its file.
    """
    named: list[Callable[..., object]] = [SFTDataModule, *MODELS.values(), AdamW, MegatronStrategy, pl.Trainer]
    named += [finetune, generate, evaluate]
    for room in (shapes, callbacks, lightning_callbacks):
        named += [one for name in room.__all__ if callable(one := getattr(room, name))]
    named += [lightning_loggers.CSVLogger, lightning_loggers.TensorBoardLogger, *METHODS.values()]
    return {name: one for one in named for name in (f"{one.__module__}.{one.__qualname__}", callable_name(one))}


def target(name: str) -> Callable[..., object]:
    """Return what ``name`` stands for; raises ConfigError for one that is no part of a recipe."""
    known = targets()
    if name in known:
        return known[name]
    if not trusting():
        raise ConfigError(f"{quoted(name)} is no part of a recipe; {suggest(name, known)} {TRUSTED}")
    return _imported(name)


def _imported(name: str) -> Callable[..., object]:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{quoted(name)} cannot be imported: {error}.") from error
    if not callable(found):
        raise ConfigError(f"{quoted(name)} is nothing that can be called.")
    made: Callable[..., object] = found
    return made
