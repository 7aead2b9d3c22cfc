"""LLaMA 3 70B."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.llama3_70b, checkpoint="meta-llama/Meta-Llama-3-70B", recompute="selective")


def trainer(dir: str = "runs", name: str = "default", num_nodes: int = 1, num_gpus_per_node: int = 8) -> run.Config:
    """Return the trainer that writes to ``dir/name``."""
    return parts.megatron_trainer(dir, name, num_nodes, num_gpus_per_node, tensor=8)


def finetune_recipe(
    dir: str = "runs",
    name: str = "default",
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
    peft: Optional[list[PEFT]] = parts.LORA,
) -> run.Partial:
    """As LLaMA 2 70B: one node with tensor parallelism of 8, the number of its query groups.

    18 GB of frozen bf16 weights a GPU, 8 packed rows of 4096 tokens a step; full fine-tuning wants
    ``trainer.strategy.pipeline_model_parallel_size=4`` on four nodes.
    """
    data = parts.sft(seq_length=4096, global_batch_size=8, packing=True)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
