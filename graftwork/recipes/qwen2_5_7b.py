"""Qwen2.5 7B."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.qwen2_5_7b, checkpoint="Qwen/Qwen2.5-7B", recompute="selective")


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
    """One 80 GB GPU tunes a 7B model with biases on queries, keys and values.

    15.2 GB of frozen bf16 weights, 8 packed rows of 4096 tokens a step. Its 4 query groups allow tensor parallelism of
    up to 4.
    """
    data = parts.sft(seq_length=4096, global_batch_size=8, packing=True)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
