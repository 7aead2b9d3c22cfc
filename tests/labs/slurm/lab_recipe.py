"""The recipe that the lab trains: a random Llama of four layers, LoRA, a few steps."""

from pathlib import Path

import nemo_run as run

from graftwork import recipes
from tests.helpers import tiny_recipe
from tests.labs.slurm.pause import Pause

STEPS = 6


def overrides(place: Path) -> list[str]:
    """Return the recipe as the command line takes it."""
    more = ["data.micro_batch_size=2", "trainer.accelerator=cpu", "peft[0].dim=4"]
    return [*tiny_recipe.overrides(place, STEPS), *more]


def over_nodes() -> list[str]:
    """Return what makes it one of two nodes with a process each, TP2."""
    return ["trainer.num_nodes=2", "trainer.strategy.tensor_model_parallel_size=2"]


def over_ranks() -> list[str]:
    """Return what makes it one of two nodes with two processes each, TP2 x DP2."""
    return ["trainer.devices=2", "trainer.num_nodes=2", "trainer.strategy.tensor_model_parallel_size=2"]


def recipe(place: Path, name: str, *more: str, pause: run.Config | None = None) -> run.Partial:
    """Return the recipe with the run directory ``place/name``, and maybe a pause in mid-run."""
    made = recipes.smollm2_135m.finetune_recipe(dir=str(place), name=name)
    made = run.cli.parse_cli_args(made, [*overrides(place), *more])
    if pause is not None:
        made.trainer.callbacks = [*(made.trainer.callbacks or []), pause]
    return made


def paused(directory: Path, **options: int) -> run.Config:
    """Return the pause whose files are in ``directory``, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    return run.Config(Pause, directory=str(directory), **options)
