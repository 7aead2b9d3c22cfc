"""Qwen3 30B A3B."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.qwen3_30b_a3b, checkpoint="Qwen/Qwen3-30B-A3B", recompute="selective")


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
    """One node tunes 31B parameters, of which a token uses 3B: each GPU has 16 of a layer's 128 experts.

    10 GB of frozen bf16 weights a GPU, 8 packed rows of 4096 tokens a step. LoRA stands at the attention: at dim 32
    that of all experts would train 1.3B values more.
    """
    data = parts.sft(seq_length=4096, global_batch_size=8, packing=True)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
