"""Tokens per second of every step and of the whole fit."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from pydantic import BaseModel
from torch import Tensor

from graftwork import parallel
from graftwork.batch import IGNORED, Batch
from graftwork.errors import CheckpointError
from graftwork.jsonfile import validated


class _Saved(BaseModel):
    average: float


class Throughput(Callback):
    """Logs ``tokens_per_second`` over all devices, counting each row up to its last answer token (no padding).

    ``average`` covers the fit without its first step (warm-up of allocators and caches) and without validation.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._steps: list[tuple[int, float]] = []
        self._before = 0.0

    @property
    def average(self) -> float:
        """Tokens per second of the fit so far; before its first step that of the run it resumes, or 0."""
        steps = self._steps[1:] or self._steps
        seconds = sum(s for _, s in steps)
        return sum(t for t, _ in steps) / seconds if seconds else self._before

    @property
    def seconds_per_step(self) -> float:
        """Mean duration of the last 20 steps."""
        recent = self._steps[-20:]
        return sum(s for _, s in recent) / len(recent) if recent else 0.0

    def state_dict(self) -> dict[str, object]:
        """Keep the average, for a finished run that is started again."""
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average."""
        self._before = validated(state_dict, _Saved, "the throughput of the training state", CheckpointError).average

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Stop the clock and log."""
        tokens = real_tokens(batch.labels) * (parallel.dp_size() if parallel.is_initialized() else 1)
        seconds = max(time.perf_counter() - self._started, 1e-9)
        self._steps.append((tokens, seconds))
        pl_module.log("tokens_per_second", tokens / seconds, batch_size=1)


def real_tokens(labels: Tensor) -> int:
    """Count the positions of ``labels`` [b, s] up to each row's last target: what follows is padding."""
    ends = torch.arange(1, labels.shape[1] + 1, device=labels.device) * (labels != IGNORED)
    return int(ends.amax(dim=1).sum())
