"""What this machine has, against what a recipe asks of it; and building a recipe where its devices need not be."""

import copy
from collections.abc import Callable

import fiddle as fdl
import nemo_run as run
import torch

from graftwork.errors import ConfigError, quoted

_GPU = ("gpu", "cuda")


def check_accelerator(recipe: run.Partial) -> None:
    """Raise ConfigError when a recipe that runs on this machine asks for a GPU and torch finds none."""
    asked = getattr(getattr(recipe, "trainer", None), "accelerator", None)
    if asked in _GPU and not torch.cuda.is_available():
        raise ConfigError(f"trainer.accelerator={asked!r}: torch finds no GPU on this machine; valid here: cpu, auto.")


def build(recipe: run.Partial) -> Callable[[], object]:
    """Return the built recipe, ready to be called; Lightning's refusal of a field of the trainer is a ConfigError."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        built: Callable[[], object] = fdl.build(recipe)
    except MisconfigurationException as error:
        reason = str(error).split("\n\nFiddle context", 1)[0]
        raise ConfigError(f"trainer: {quoted(' '.join(reason.split()), 400, bare=True)}") from error
    return built


def check_values(recipe: run.Partial) -> None:
    """Build a recipe, so that every constructor checks its values, as if on a machine with the devices it asks for."""
    if getattr(getattr(recipe, "trainer", None), "accelerator", None) in _GPU and not torch.cuda.is_available():
        recipe = copy.deepcopy(recipe)
        recipe.trainer.accelerator = "cpu"
    build(recipe)
