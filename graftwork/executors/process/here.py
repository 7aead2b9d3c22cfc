"""Building a recipe on this machine, which need not have the devices that the recipe asks for."""

import copy
from collections.abc import Callable

import fiddle as fdl
import nemo_run as run
import torch

from graftwork.errors import ConfigError, quoted
from graftwork.executors.placing.placement import ON_GPUS


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
    if getattr(getattr(recipe, "trainer", None), "accelerator", None) in ON_GPUS and not torch.cuda.is_available():
        recipe = copy.deepcopy(recipe)
        recipe.trainer.accelerator = "cpu"
    build(recipe)
