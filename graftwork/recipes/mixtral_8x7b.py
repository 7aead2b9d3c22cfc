"""Mixtral 8x7B."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.mixtral_8x7b, checkpoint="mistralai/Mixtral-8x7B-v0.1", recompute="selective")


def trainer(dir: str = "runs", name: str = "default", num_nodes: int = 1, num_gpus_per_node: int = 8) -> run.Config:
    """Return the trainer that writes to ``dir/name``."""
    return parts.megatron_trainer(dir, name, num_nodes, num_gpus_per_node, expert=8)


def finetune_recipe(
    dir: str = "runs",
    name: str = "default",
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
    peft: Optional[list[PEFT]] = parts.ATTENTION_LORA,
) -> run.Partial:
    """One node tunes 47B parameters: each GPU has one expert of every layer, and the attention whole.

    15 GB of frozen bf16 weights a GPU, 8 packed rows of 4096 tokens a step. LoRA stands at the attention, as every
    token passes there; at the experts it takes ``peft[0].target_modules``.
    """
    data = parts.sft(seq_length=4096, global_batch_size=8, packing=True)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
