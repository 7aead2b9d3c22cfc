"""Qwen3 0.6B."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.qwen3_0_6b, checkpoint="Qwen/Qwen3-0.6B", dtype="auto")


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
    """The smallest Qwen3 tunes on one GPU of 16 GB, or on a CPU with patience.

    1.2 GB of frozen bf16 weights, 16 packed rows of 2048 tokens a step.
    """
    data = parts.sft(seq_length=2048, global_batch_size=16, packing=True)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
