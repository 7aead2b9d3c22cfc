"""graftwork's side of the comparison."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from workload import RANK, VIRTUAL_TOKENS, Case, microbatches
from workload import Batch as Work

from graftwork import models
from graftwork.batch import IGNORED, Batch
from graftwork.data.collate import Collator
from graftwork.data.packing import best_fit_decreasing
from graftwork.data.rows import Sample
from graftwork.optim import AdamW
from graftwork.peft import IA3, PEFT, LoRA, PromptTuning, PTuning

ADAPTERS: dict[str, Callable[[], PEFT]] = {
    "lora": lambda: LoRA(dim=RANK),
    "lora_same": lambda: LoRA(dim=RANK, target_modules=["linear_proj", "linear_fc2"]),
    "ia3": lambda: IA3(),
    "ptuning": lambda: PTuning(virtual_tokens=VIRTUAL_TOKENS),
    "prompt": lambda: PromptTuning(virtual_tokens=VIRTUAL_TOKENS),
}


class Ours:
    """One case: a model, its optimizer, its batch laid out once (data loading is not what is measured)."""

    def __init__(self, checkpoint: Path, case: Case, batch: Work) -> None:
        self.model = load(checkpoint, case.dtype)
        if case.adapters is not None:
            self.model.add_adapter(ADAPTERS[case.adapters]())
        self.model.train()
        self.count = batch.target_count
        batch = self._prompted(batch)
        self.batches = packed(batch) if case.packed else padded(batch)
        self.optimizer, self.schedule = AdamW(schedule="constant").build(self.model, 1)

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def step(self) -> float:
        """Forward, backward and update over all microbatches; returns the loss before the update."""
        total = 0.0
        for batch in self.batches:
            output, loss_func = self.model.forward_step(iter([batch]), self.model.chunks[0])
            loss_sum, _, _ = loss_func(output)
            (loss_sum / self.count).backward()
            total += float(loss_sum.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return total / self.count

    def _prompted(self, batch: Work) -> Work:
        """The same rows with the virtual tokens in front, as the data module lays them."""
        ids = torch.tensor([i for slot in self.model.prompt_layout.slots for i in slot.ids], dtype=torch.int64)
        tokens = [torch.cat([ids, row]) for row in batch.tokens]
        targets = [torch.cat([torch.full_like(ids, IGNORED), row]) for row in batch.targets]
        return replace(batch, tokens=tokens, targets=targets, length=batch.length + len(ids))

    def save(self, path: Path) -> None:
        """Write the adapters."""
        self.model.save_adapters(path)

    def restore(self, path: Path) -> None:
        """Read the adapters into the bare base (and take them off again)."""
        self.model.delete_adapter("lora")
        self.model.load_adapters(path)


def load(checkpoint: Path, dtype: str = "fp32") -> Any:
    """Build the model and read its weights."""
    return models.load(checkpoint, dtype=dtype)


def padded(batch: Work) -> list[Batch]:
    """Microbatches padded to their own longest row."""
    collate = Collator(pad=0, micro_batch_size=batch.micro, packed=False)
    samples = _samples(batch)
    parts = [samples[rows] for rows in microbatches(batch)]
    return [collate([[s] for s in part], max(len(s.tokens) for s in part)) for part in parts]


def packed(batch: Work) -> list[Batch]:
    """The same rows, bin-packed into rows of the full length, one a microbatch."""
    samples = _samples(batch)
    bins = best_fit_decreasing([len(s.tokens) for s in samples], batch.length)
    collate = Collator(pad=0, micro_batch_size=1, packed=True)
    return [collate([[samples[i] for i in members]], batch.length) for members in bins]


def through_the_trainer(checkpoint: Path, case: Case, batch: Work, steps: int) -> float:
    """Least seconds a step through ``trainer.fit`` with MegatronStrategy: what Lightning and the schedule add."""
    import lightning.pytorch as pl

    from graftwork.training import MegatronStrategy

    clock = _clock()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        strategy=MegatronStrategy(),
        logger=False,
        callbacks=[clock],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    model = models.load(checkpoint, trainer=trainer, dtype=case.dtype)
    model.add_adapter(ADAPTERS[case.adapters or "lora"]())
    model.prepare(AdamW(schedule="constant"))
    (only,) = padded(batch)
    trainer.fit(model, train_dataloaders=_Repeat(only, steps))
    return min(clock.seconds)


class _Repeat:
    def __init__(self, batch: Batch, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.times)


def _clock() -> Any:
    import time

    import lightning.pytorch as pl

    class Clock(pl.Callback):
        seconds: list[float] = []
        last = 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            now = time.perf_counter()
            if self.last:
                self.seconds.append(now - self.last)
            self.last = now

    return Clock()


def _samples(batch: Work) -> list[Sample]:
    rows = zip(batch.tokens, batch.targets)
    return [Sample(tokens.numpy(), labels.numpy(), i) for i, (tokens, labels) in enumerate(rows)]
