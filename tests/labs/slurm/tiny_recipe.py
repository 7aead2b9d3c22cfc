"""The recipe that the lab trains: a random Llama of four layers, LoRA, a few steps."""

from pathlib import Path

import nemo_run as run

from graftwork import recipes
from tests.labs.slurm.pause import Pause

SHAPE = {
    "num_layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rotary_base": 10000.0,
    "layernorm_epsilon": 1e-6,
    "tie_embeddings": False,
}
STEPS = 6


def overrides(place: Path) -> list[str]:
    """Return the recipe as the command line takes it."""
    return [
        *(f"model.shape.{name}={value}" for name, value in SHAPE.items()),
        f"model.checkpoint={place / 'base'}",
        "model.dtype=fp32",
        f"data.train={place / 'train.jsonl'}",
        f"data.cache_dir={place / 'cache'}",
        "data.validation_fraction=0.25",
        "data.seq_length=64",
        "data.micro_batch_size=2",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS // 2}",
        "trainer.accelerator=cpu",
        "optim.lr=2e-3",
        "optim.warmup_steps=1",
        "peft[0].dim=4",
    ]


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
