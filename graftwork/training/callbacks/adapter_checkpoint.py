"""The result of a run: best adapters by validation loss, the last ones, or the exported model of full fine-tuning."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import BaseModel

from graftwork.data.source import content_hash, named
from graftwork.errors import CheckpointError
from graftwork.jsonfile import validated
from graftwork.models.cards import retell
from graftwork.peft.artifact.card import DataFile, Told
from graftwork.training.run import WritesRunDown
from graftwork.training.summary import Metrics
from graftwork.training.trainee import HasFiles, Trainee, data_of, trainee


class _Saved(BaseModel):
    best: Optional[float]
    best_step: Optional[int]
    path: Optional[str]


class AdapterCheckpoint(WritesRunDown, Checkpoint):
    """Keeps ``adapter/`` the best by validation loss; ``adapter-last/`` appears when the end is worse than the best.

    Without validation ``adapter/`` is the last. Full fine-tuning writes ``model/`` (a Hugging Face directory) at the
    end. Every directory is written whole or not at all, by all ranks together.

    Args:
        directory: Where they go; default the trainer's ``default_root_dir``.
        monitor: Metric of which less is better.
        verify: Whether what was written is proved before it takes the place of the adapter before it.
    """

    def __init__(self, directory: Optional[str] = None, monitor: str = "val_loss", verify: bool = True) -> None:
        self.directory = directory
        self.monitor = monitor
        self.verify = verify
        self.best: float | None = None
        self.best_step: int | None = None
        self.path: Path | None = None
        self._ended = False
        self._files: Sequence[DataFile] | None = None
        self._told: tuple[Path, Told] | None = None

    @property
    def state_key(self) -> str:
        """One per directory and metric."""
        return f"AdapterCheckpoint[{self.monitor}]"

    def state_dict(self) -> dict[str, object]:
        """Remember the best for a resumed run."""
        return {"best": self.best, "best_step": self.best_step, "path": str(self.path) if self.path else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best, so that a worse adapter does not take its place."""
        saved = validated(state_dict, _Saved, "the state of the best adapter", CheckpointError)
        self.best, self.best_step = saved.best, saved.best_step
        self.path = Path(saved.path) if saved.path else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a validation that would never be due run at the end: without one there is no best."""
        steps, every = trainer.estimated_stepping_batches, trainer.check_val_every_n_epoch
        in_epoch = trainer.val_check_batch or math.inf
        due = in_epoch if every is None else (every - 1) * trainer.num_training_batches + in_epoch
        if trainer.enable_validation and steps < due < math.inf:
            trainer.check_val_every_n_epoch, trainer.val_check_batch = None, int(steps)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the adapters if they are the best so far."""
        value, model = trainer.callback_metrics.get(self.monitor), trainee(pl_module)
        if value is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        found = float(value)
        if math.isfinite(found) and (self.best is None or found < self.best) and model.adapters:
            self.path = self._save(trainer, model, "adapter", {self.monitor: {"after": found}})
            self.best, self.best_step = found, trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last adapters, or the fine-tuned model."""
        root, model = self._root(trainer), trainee(pl_module)
        if not model.adapters:
            self.path = root / "model"
            model.export_hf(self.path)
        elif self.best_step is None:
            self.path = self._save(trainer, model, "adapter")
        else:
            self.path = root / "adapter"
            if self.best_step != trainer.global_step:
                self._save(trainer, model, "adapter-last")
        self._ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the result of a run that was stopped after its last step: started again, it trains nothing more."""
        if not self._ended and trainer.global_step:
            self.on_train_end(trainer, pl_module)

    def retell(self, metrics: Metrics) -> None:
        """Write into the card of what was saved last what was measured of it; on the first rank alone."""
        if self._told is not None:
            path, told = self._told
            retell(path, replace(told, metrics={**told.metrics, **metrics}))

    def _save(self, trainer: Trainer, model: Trainee, name: str, metrics: Metrics | None = None) -> Path:
        path = self._root(trainer) / name
        if self._files is None:
            self._files = _files(data_of(trainer)) if trainer.is_global_zero else []
        told = Told(self._files, metrics or {})
        facts, step = self.facts, trainer.global_step
        model.save_adapters(path, step=step, recipe=facts.recipe_text, verify=self.verify, told=told)
        self._told = path, told
        return path

    def _root(self, trainer: Trainer) -> Path:
        return Path(self.directory or trainer.default_root_dir).resolve()


def _files(data: object) -> list[DataFile]:
    """Return the files that data train on and are validated with."""
    given = data.files if isinstance(data, HasFiles) else {}
    found = [(use, part) for use in ("train", "validation") for part in named(given.get(use))]
    return [DataFile(use, Path(part).name, content_hash(part)) for use, part in found]
