"""T5, T5 1.1 and mT5: one recipe for each published size, which differ in what one line of a table says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import nemo_run as run

from graftwork.models import shapes
from graftwork.models.shapes import Shape
from graftwork.peft import PEFT
from graftwork.recipes import parts


@dataclass(frozen=True)
class T5Recipe:
    """The recipe of one size: its shape, the hub's checkpoint, and the microbatch that fits beside its weights."""

    shape: Callable[..., Shape]
    checkpoint: str
    micro_batch_size: int
    dtype: str = "bf16"

    def model(self) -> run.Config:
        """Return the base model; what does not fit beside 16 rows is recomputed."""
        recompute = "selective" if self.micro_batch_size < 16 else None
        return parts.t5(self.shape, checkpoint=self.checkpoint, dtype=self.dtype, recompute=recompute)

    def trainer(
        self, dir: str = "runs", name: str = "default", num_nodes: int = 1, num_gpus_per_node: int = 1
    ) -> run.Config:
        """Return the trainer that writes to ``dir/name``."""
        return parts.megatron_trainer(dir, name, num_nodes, num_gpus_per_node)

    def finetune_recipe(
        self,
        dir: str = "runs",
        name: str = "default",
        num_nodes: int = 1,
        num_gpus_per_node: int = 1,
        peft: Optional[list[PEFT]] = parts.LORA,
    ) -> run.Partial:
        """One 80 GB GPU tunes any size: 26 GB of frozen bf16 weights are the most, mT5's largest.

        64 rows a step, prompts of up to 512 tokens, the length that T5 was trained with. Only the smallest sizes train
        in fp32 where bf16 is slow; T5 was trained in bf16 and does not bear fp16.
        """
        data = parts.sft(seq_length=512, global_batch_size=64, micro_batch_size=self.micro_batch_size)
        trainer = self.trainer(dir, name, num_nodes, num_gpus_per_node)
        return parts.finetune_task(self.model(), trainer, data, peft, warmup_steps=50)


t5_small = T5Recipe(shapes.t5_small, "google-t5/t5-small", 16, dtype="auto")
t5_base = T5Recipe(shapes.t5_base, "google-t5/t5-base", 16, dtype="auto")
t5_large = T5Recipe(shapes.t5_large, "google-t5/t5-large", 16)
t5_3b = T5Recipe(shapes.t5_3b, "google-t5/t5-3b", 8)
t5_11b = T5Recipe(shapes.t5_11b, "google-t5/t5-11b", 2)
t5v11_small = T5Recipe(shapes.t5v11_small, "google/t5-v1_1-small", 16, dtype="auto")
t5v11_base = T5Recipe(shapes.t5v11_base, "google/t5-v1_1-base", 16, dtype="auto")
t5v11_large = T5Recipe(shapes.t5v11_large, "google/t5-v1_1-large", 16)
t5v11_xl = T5Recipe(shapes.t5v11_xl, "google/t5-v1_1-xl", 8)
t5v11_xxl = T5Recipe(shapes.t5v11_xxl, "google/t5-v1_1-xxl", 4)
mt5_small = T5Recipe(shapes.mt5_small, "google/mt5-small", 16, dtype="auto")
mt5_base = T5Recipe(shapes.mt5_base, "google/mt5-base", 16, dtype="auto")
mt5_large = T5Recipe(shapes.mt5_large, "google/mt5-large", 16)
mt5_xl = T5Recipe(shapes.mt5_xl, "google/mt5-xl", 8)
mt5_xxl = T5Recipe(shapes.mt5_xxl, "google/mt5-xxl", 4)
