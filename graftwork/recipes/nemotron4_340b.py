"""Nemotron-4 340B; set ``model.checkpoint`` to a Hugging Face directory of model type nemotron."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.nemotron4_340b, recompute="full")


def trainer(dir: str = "runs", name: str = "default", num_nodes: int = 2, num_gpus_per_node: int = 8) -> run.Config:
    """Return the trainer that writes to ``dir/name``."""
    return parts.megatron_trainer(dir, name, num_nodes, num_gpus_per_node, tensor=8, pipeline=2)


def finetune_recipe(
    dir: str = "runs",
    name: str = "default",
    num_nodes: int = 2,
    num_gpus_per_node: int = 8,
    peft: Optional[list[PEFT]] = parts.LORA,
) -> run.Partial:
    """680 GB of frozen bf16 weights fit two nodes of eight 80 GB GPUs: tensor parallelism inside, two stages across.

    43 GB of weights a GPU, all activations recomputed, 16 packed rows of 4096 tokens a step so that the pipeline of two
    stages idles for one microbatch in seventeen.
    """
    data = parts.sft(seq_length=4096, global_batch_size=16, packing=True)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
