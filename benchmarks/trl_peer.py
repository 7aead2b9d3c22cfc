"""TRL's side where it is installed: SFTTrainer's own packing, collator and step, one bin of rows a microbatch."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peer import configuration, load
from torch import Tensor
from workload import IGNORED, Batch, Case


class TRL:
    """One case: SFTTrainer with packing (best-fit decreasing, without padding), in fp32 on the CPU."""

    def __init__(self, checkpoint: Path, case: Case, batch: Batch) -> None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = [{"input_ids": t.tolist(), "labels": _labels(targets)} for t, targets in _rows(batch)]
        self._folder = tempfile.TemporaryDirectory()
        settings = SFTConfig(
            self._folder.name,
            packing=True,
            max_length=batch.length,
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
        )
        self.trainer: Any = SFTTrainer(
            load(checkpoint, case.dtype),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(),
            peft_config=configuration(case.adapters or "lora"),
        )
        self.count = torch.tensor(batch.target_count)
        self.batches = list(self.trainer.get_train_dataloader())
        self.trainer.create_optimizer()
        self.model: Any = self.trainer.model.train()

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def step(self) -> float:
        """Forward, backward and update over all microbatches; returns the loss before the update."""
        step = self.trainer.training_step
        total = sum(float(step(self.model, dict(inputs), self.count)) for inputs in self.batches)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return total


def _rows(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch.tokens, batch.targets))


def _labels(targets: Tensor) -> list[int]:
    """TRL shifts the labels itself: they stand at the token that is to be predicted."""
    return [IGNORED, *targets[:-1].tolist()]


def _tokenizer() -> Any:
    """Return a tokenizer that TRL asks for and, rows being tokens already, does not use."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
