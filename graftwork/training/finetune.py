"""finetune: from model, data and a stack of adapters to a run directory."""

import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional

import numpy
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from graftwork.errors import ConfigError
from graftwork.optim import AdamW
from graftwork.peft import PEFT
from graftwork.training.callbacks import AdapterCheckpoint, Progress, Report, SelfCheck, Throughput, TrainingState
from graftwork.training.run_directory import discard, latest, locked, states


def finetune(
    model: LightningModule,
    trainer: Trainer,
    data: LightningDataModule,
    peft: Optional[list[PEFT]] = None,
    optim: Optional[AdamW] = None,
    resume: bool = True,
    seed: int = 1234,
    recipe_text: Optional[str] = None,
) -> dict[str, Any]:
    """Train ``model`` on ``data`` with a stack of transforms and return the fields of ``summary.json``.

    The run directory is ``trainer.default_root_dir``: ``adapter/`` (or ``model/`` in full fine-tuning), ``logs/``,
    ``summary.json``, ``loss.png``, ``checkpoints/`` (training states). ``peft`` None or [] is full fine-tuning;
    ``optim`` None is ``AdamW()``; ``seed`` governs initial adapter values, random base weights and dropout;
    ``recipe_text`` is remembered by its hash and in the adapter. With ``resume`` a run whose directory holds a
    training state goes on where it stopped; without it the states are deleted and training starts anew. Raises
    GraftworkError with one sentence when something is wrong.
    """
    stack = as_stack(peft)
    seed_everything(seed)
    model.optim = optim or AdamW()  # type: ignore[assignment]
    if not getattr(model, "chunks", None):
        model.seed = seed  # type: ignore[assignment]
    if hasattr(trainer.strategy, "drives_backward"):
        trainer.strategy.seed = seed  # type: ignore[attr-defined]
    report = equip(trainer, stack, recipe_text, seed)
    root = Path(trainer.default_root_dir).resolve()
    with locked(root) if trainer.is_global_zero else nullcontext(), _quiet():
        trainer.fit(model, datamodule=data, ckpt_path=_resume_from(root, resume, trainer))
    return report.summary


def _resume_from(root: Path, resume: bool, trainer: Trainer) -> str | None:
    """Return the training state to go on from, None to start anew."""
    drives = getattr(trainer.strategy, "drives_backward", False)
    found = latest(root) if drives and resume else None
    if found is not None and trainer.is_global_zero:
        print(f"resuming from {found}", flush=True)
    if not resume and trainer.is_global_zero:
        for path in states(root):
            discard(path)
    chosen = str(found) if found is not None else None
    if drives:
        trainer.strategy.resume_from = chosen  # type: ignore[attr-defined]
    return chosen


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's adverts and its warnings about itself off the terminal."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\b")
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


def as_stack(peft: PEFT | Sequence[PEFT] | None) -> list[PEFT]:
    """Return a list of transforms for None, one transform or several; raises ConfigError for anything else."""
    stack = [peft] if isinstance(peft, PEFT) else list(peft or [])
    for item in stack:
        if not isinstance(item, PEFT):
            raise ConfigError(f"peft holds {item!r}, which is no PEFT transform; give e.g. [LoRA(dim=16)].")
    return stack


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def equip(trainer: Trainer, stack: Sequence[PEFT], recipe_text: str | None, seed: int) -> Report:
    """Give ``trainer`` what every run has; a callback or logger that the user has set is kept, not doubled."""
    callbacks: list[Callback] = [c for c in trainer.callbacks if not _is_default(c)]  # type: ignore[attr-defined]
    bar = any(type(c) in (TQDMProgressBar, RichProgressBar) for c in trainer.callbacks)  # type: ignore[attr-defined]
    states_too = [TrainingState] if hasattr(trainer.strategy, "drives_backward") else []
    for made in (Throughput, SelfCheck, AdapterCheckpoint, Report, *([Progress] if bar else []), *states_too):
        if not any(isinstance(c, made) for c in callbacks):
            callbacks.append(made())
    callbacks.sort(key=lambda c: isinstance(c, TrainingState))  # last: it saves what the others have become
    trainer.callbacks = [*(t for t in stack if t not in callbacks), *callbacks]  # type: ignore[attr-defined]
    report = next(c for c in callbacks if isinstance(c, Report))
    report.seed = seed
    for callback in callbacks:
        if isinstance(callback, AdapterCheckpoint | Report):
            callback.recipe_text = recipe_text
    if all(_is_default_logger(logger) for logger in trainer.loggers):
        _set_loggers(trainer)
    return report


def _set_loggers(trainer: Trainer) -> None:
    root = Path(trainer.default_root_dir).resolve()
    csv = CSVLogger(root, name="logs")
    trainer.loggers = [csv, TensorBoardLogger(root, name="logs", version=csv.version)]


def _is_default(callback: Callback) -> bool:
    """Tell the callbacks that Lightning adds unasked from those that a user has configured."""
    if type(callback) is ModelCheckpoint:
        return callback.dirpath is None and callback.monitor is None
    return type(callback) in (TQDMProgressBar, RichProgressBar, ModelSummary, RichModelSummary)


def _is_default_logger(logger: Any) -> bool:
    return isinstance(logger, CSVLogger | TensorBoardLogger) and logger.name == "lightning_logs"
