"""summary.json, loss.png and report.html at the end of a run."""

import json
import math
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from pydantic import BaseModel, Field

from graftwork.atomic import atomic_write_bytes, atomic_write_text
from graftwork.errors import CheckpointError
from graftwork.jsonfile import validated
from graftwork.models.base import Model
from graftwork.parallel.collective import agreed
from graftwork.peft.movement import Movement, movements
from graftwork.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from graftwork.training.callbacks.metrics import BeforeAfter
from graftwork.training.callbacks.samples import Samples
from graftwork.training.callbacks.throughput import Throughput
from graftwork.training.page.run_page import FIGURES, Story, run_page
from graftwork.training.page.usage import base_of, usage_of
from graftwork.training.plot import loss_curve
from graftwork.training.run import WritesRunDown
from graftwork.training.summary import Summary, count_parameters, finite, peak_memory_bytes, summary
from graftwork.training.trainee import callbacks_of, trainee

MAX_POINTS = 4000
"""Longer curves drop every second point, so that a training state never grows with the run."""


class _Saved(BaseModel):
    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    every: int = Field(ge=1, le=2**60)
    parameters: tuple[int, int]
    series: dict[str, list[tuple[int, float]]] = {}
    seconds: float = Field(default=0.0, ge=0.0)


class Report(WritesRunDown, Callback):
    """Collects curves and writes ``summary.json``, ``loss.png`` and ``report.html`` when the fit ends.

    A resumed run goes on with them. The page comes last: a run has its result before.

    Args:
        directory: Where they go; default the trainer's ``default_root_dir``.
    """

    def __init__(self, directory: Optional[str] = None) -> None:
        self.directory = directory
        self.train: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.series: dict[str, list[tuple[int, float]]] = {}
        self._summary: Summary | None = None
        self._every = 1
        self._seconds, self._begun = 0.0, time.monotonic()
        self._parameters = (0, 0)

    @property
    def summary(self) -> Summary:
        """The fields of ``summary.json``, once the fit has ended."""
        assert self._summary is not None, "the summary is made at the end of the fit"
        return self._summary

    @property
    def seconds(self) -> float:
        """Duration of the training so far, over all its starts."""
        return self._seconds + time.monotonic() - self._begun

    def state_dict(self) -> dict[str, object]:
        """Keep the curves."""
        curve = {"train": self.train, "validation": self.validation, "every": self._every}
        return {**curve, "parameters": self._parameters, "series": self.series, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves."""
        saved = validated(state_dict, _Saved, "the loss curve of the training state", CheckpointError)
        self.train, self.validation = saved.train, saved.validation
        self._every, self._parameters = saved.every, saved.parameters
        self.series, self._seconds = saved.series, saved.seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count parameters, and time from here."""
        self._parameters = count_parameters(pl_module)
        self._begun = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Add a point to every curve."""
        step = trainer.global_step
        if step % self._every:
            return
        metrics = trainer.callback_metrics
        if "train_loss" not in metrics:
            return
        self.train.append((step, float(metrics["train_loss"])))
        others = {name: float(value) for name, value in metrics.items() if name.partition("/")[0] in FIGURES}
        for name, value in {**others, "memory_gb": peak_memory_bytes() / 1e9}.items():
            if math.isfinite(value):
                self.series.setdefault(name, []).append((step, float(f"{value:.6g}")))
        if len(self.train) > MAX_POINTS:
            self.train, self._every = self.train[1::2], self._every * 2
            kept = {step for step, _ in self.train}
            self.series = {name: [p for p in points if p[0] in kept] for name, points in self.series.items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a validation point."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self.validation.append((trainer.global_step, float(loss)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files; by now every other callback has done its part. No rank goes on when one cannot."""
        self._seconds, self._begun = self.seconds, time.monotonic()
        made = self._summary = self._summarise(trainer)
        agreed(lambda: self._write(trainer, pl_module, made) if trainer.is_global_zero else None)
        moved = movements(pl_module.stack) if isinstance(pl_module, Model) and pl_module.adapters else []
        agreed(lambda: self._write_page(trainer, pl_module, made, moved) if trainer.is_global_zero else None)

    def _write(self, trainer: Trainer, pl_module: LightningModule, made: Summary) -> None:
        root = self._root(trainer)
        atomic_write_text(root / "summary.json", json.dumps(made, indent=2) + "\n")
        checkpoint = _checkpoint(trainer)
        if checkpoint is not None and made["metrics"]:
            checkpoint.retell(made["metrics"])
        names = " + ".join(type(t).__name__ for t in trainee(pl_module).adapters.values()) or "full fine-tuning"
        atomic_write_bytes(root / "loss.png", loss_curve(self.train, self.validation, f"{root.name}: {names}"))

    def _write_page(
        self, trainer: Trainer, pl_module: LightningModule, made: Summary, moved: Sequence[Movement]
    ) -> None:
        root, callbacks = self._root(trainer), callbacks_of(trainer)
        story = Story(
            name=root.name,
            directory=str(root),
            stack=[repr(transform) for transform in trainee(pl_module).adapters.values()],
            base=base_of(pl_module),
            ended=f"{datetime.now():%Y-%m-%d %H:%M}",
            summary=made,
            seconds=self._seconds,
            train=self.train,
            validation=self.validation,
            series=self.series,
            shown=[answer for c in callbacks if isinstance(c, Samples) for answer in c.shown],
            confusion={when: n for c in callbacks if isinstance(c, BeforeAfter) for when, n in c.confusion.items()},
            moved=moved,
            usage=usage_of(pl_module, made["adapter_path"]),
            recipe_text=self.facts.recipe_text,
            recipe_changes=self.facts.recipe_changes,
        )
        atomic_write_text(root / "report.html", run_page(story))

    def _root(self, trainer: Trainer) -> Path:
        return Path(self.directory or trainer.default_root_dir).resolve()

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
