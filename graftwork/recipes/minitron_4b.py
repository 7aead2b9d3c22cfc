"""Minitron 4B."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.minitron_4b, checkpoint="nvidia/Minitron-4B-Base", recompute="selective")


def trainer(dir: str = "runs", name: str = "default", num_nodes: int = 1, num_gpus_per_node: int = 1) -> run.Config:
    """Return the trainer that writes to ``dir/name``."""
    return parts.megatron_trainer(dir, name, num_nodes, num_gpus_per_node)


def finetune_recipe(
    dir: str = "runs",
    name: str = "default",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft: Optional[list[PEFT]] = parts.LORA,
) -> run.Partial:
    """Nemotron-4, pruned to 4B, tunes on one GPU of 24 GB although half of its weights are a vocabulary of 256,000.

    8.4 GB of frozen bf16 weights, 8 packed rows of 4096 tokens, all its positions, a step.
    """
    data = parts.sft(seq_length=4096, global_batch_size=8, packing=True)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
