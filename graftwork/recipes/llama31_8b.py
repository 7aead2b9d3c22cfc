"""LLaMA 3.1 8B."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.llama31_8b, checkpoint="meta-llama/Llama-3.1-8B", recompute="selective")


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
    """One 80 GB GPU tunes the 8B model whose context reaches 131,072 tokens, on rows of 4096.

    16 GB of frozen bf16 weights, 8 packed rows a step. Longer rows want ``data.seq_length`` and, from some 16,384 on,
    ``trainer.strategy.context_parallel_size``.
    """
    data = parts.sft(seq_length=4096, global_batch_size=8, packing=True)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
