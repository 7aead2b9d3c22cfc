"""Mistral 7B."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.mistral_7b, checkpoint="mistralai/Mistral-7B-v0.3", recompute="selective")


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
    """One 80 GB GPU tunes the 7B model without a window: version 0.3 sees all of its 32,768 positions.

    14.5 GB of frozen bf16 weights, 8 packed rows of 4096 tokens a step. Version 0.1 has a window of 4096, which
    ``auto(base=mistralai/Mistral-7B-v0.1)`` takes for its context.
    """
    data = parts.sft(seq_length=4096, global_batch_size=8, packing=True)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
