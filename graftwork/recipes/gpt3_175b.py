"""GPT-3 175B; no weights are public: set ``model.checkpoint`` to a GPT-2-style Hugging Face directory."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.gpt3_175b, recompute="full")


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
    """350 GB of frozen bf16 weights fit one node of eight 80 GB GPUs when only adapters train.

    Tensor parallelism over the node (44 GB of weights a GPU), all activations recomputed, 32 rows of at most 2048
    tokens a step. Full fine-tuning of this size needs far more GPUs: raise the pipeline size and ``num_nodes``.
    """
    data = parts.sft(seq_length=2048, global_batch_size=32)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=50)
