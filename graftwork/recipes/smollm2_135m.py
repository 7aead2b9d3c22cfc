"""SmolLM2 135M: the small model that runs anywhere."""

from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.peft import PEFT
from graftwork.recipes import parts


def model() -> run.Config:
    """Return the base model."""
    return parts.gpt(shapes.smollm2_135m, checkpoint="smollm2_135m", dtype="auto")


def trainer(dir: str = "runs", name: str = "default", num_nodes: int = 1, num_gpus_per_node: int = 1) -> run.Config:
    """Return the trainer that writes to ``dir/name``."""
    return parts.megatron_trainer(dir, name, num_nodes, num_gpus_per_node, max_steps=200)


def finetune_recipe(
    dir: str = "runs",
    name: str = "default",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft: Optional[list[PEFT]] = parts.LORA,
) -> run.Partial:
    """A 135M instruction-tuned model learns a narrow task from a few hundred examples on two CPU cores.

    8 rows of at most 512 tokens a step, 200 steps: short prompts and answers, minutes on a laptop. Its 3 query groups
    allow tensor parallelism of 1 or 3 only.
    """
    data = parts.sft(seq_length=512, global_batch_size=8, micro_batch_size=8)
    trainer_config = trainer(dir, name, num_nodes, num_gpus_per_node)
    return parts.finetune_task(model(), trainer_config, data, peft, warmup_steps=10)
