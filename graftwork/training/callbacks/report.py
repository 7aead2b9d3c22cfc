"""summary.json and loss.png at the end of a run."""

import json
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from pydantic import BaseModel, Field

from graftwork.atomic import atomic_write_bytes, atomic_write_text
from graftwork.errors import CheckpointError
from graftwork.jsonfile import validated
from graftwork.parallel.collective import agreed
from graftwork.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from graftwork.training.callbacks.metrics import BeforeAfter
from graftwork.training.callbacks.throughput import Throughput
from graftwork.training.plot import loss_curve
from graftwork.training.run import WritesRunDown
from graftwork.training.summary import Summary, count_parameters, finite, summary
from graftwork.training.trainee import callbacks_of, trainee

MAX_POINTS = 4000
"""Longer curves drop every second point, so that a training state never grows with the run."""


class _Saved(BaseModel):
    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    every: int = Field(ge=1, le=2**60)
    parameters: tuple[int, int]


class Report(WritesRunDown, Callback):
    """Collects the losses and writes ``summary.json`` and ``loss.png`` when the fit ends; a resumed run goes on.

    Args:
        directory: Where they go; default the trainer's ``default_root_dir``.
    """

    def __init__(self, directory: Optional[str] = None) -> None:
        self.directory = directory
        self.train: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self._summary: Summary | None = None
        self._every = 1
        self._parameters = (0, 0)

    @property
    def summary(self) -> Summary:
        """The fields of ``summary.json``, once the fit has ended."""
        assert self._summary is not None, "the summary is made at the end of the fit"
        return self._summary

    def state_dict(self) -> dict[str, object]:
        """Keep the curve."""
        curve = {"train": self.train, "validation": self.validation, "every": self._every}
        return {**curve, "parameters": self._parameters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curve."""
        saved = validated(state_dict, _Saved, "the loss curve of the training state", CheckpointError)
        self.train, self.validation = saved.train, saved.validation
        self._every, self._parameters = saved.every, saved.parameters

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count parameters."""
        self._parameters = count_parameters(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Add a point."""
        loss = trainer.callback_metrics.get("train_loss")
        if loss is None or trainer.global_step % self._every:
            return
        self.train.append((trainer.global_step, float(loss)))
        if len(self.train) > MAX_POINTS:
            self.train, self._every = self.train[1::2], self._every * 2

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a validation point."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self.validation.append((trainer.global_step, float(loss)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both files; by now every other callback has done its part. No rank goes on when one cannot."""
        made = self._summary = self._summarise(trainer)
        agreed(lambda: self._write(trainer, pl_module, made) if trainer.is_global_zero else None)

    def _write(self, trainer: Trainer, pl_module: LightningModule, made: Summary) -> None:
        root = Path(self.directory or trainer.default_root_dir).resolve()
        atomic_write_text(root / "summary.json", json.dumps(made, indent=2) + "\n")
        checkpoint = _checkpoint(trainer)
        if checkpoint is not None and made["metrics"]:
            checkpoint.retell(made["metrics"])
        names = " + ".join(type(t).__name__ for t in trainee(pl_module).adapters.values()) or "full fine-tuning"
        atomic_write_bytes(root / "loss.png", loss_curve(self.train, self.validation, f"{root.name}: {names}"))

    def _summarise(self, trainer: Trainer) -> Summary:
        callbacks = callbacks_of(trainer)
        checkpoint = _checkpoint(trainer)
        rate = next((c for c in callbacks if isinstance(c, Throughput)), None)
        metrics = {k: v for c in callbacks if isinstance(c, BeforeAfter) for k, v in c.metrics.items()}
        best = checkpoint.best if checkpoint is not None else None
        return summary(
            facts=self.facts,
            steps=trainer.global_step,
            train_loss=finite(self.train[-1][1] if self.train else None),
            val_loss=finite(best if best is not None else (self.validation[-1][1] if self.validation else None)),
            metrics=metrics,
            tokens_per_second=rate.average if rate is not None else 0.0,
            parameters=self._parameters,
            adapter_path=checkpoint.path if checkpoint is not None else None,
        )


def _checkpoint(trainer: Trainer) -> AdapterCheckpoint | None:
    return next((c for c in callbacks_of(trainer) if isinstance(c, AdapterCheckpoint)), None)
