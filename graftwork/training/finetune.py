"""finetune: from model, data and a stack of adapters to a run directory."""

import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Optional

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
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from graftwork.errors import ConfigError, GraftworkError
from graftwork.optim import AdamW
from graftwork.peft import PEFT
from graftwork.training.callbacks import (
    AdapterCheckpoint,
    Banner,
    EarlyStop,
    Progress,
    Report,
    Room,
    Samples,
    SelfCheck,
    Throughput,
    TrainingState,
)
from graftwork.training.loggers import made, quiet_writers, refuse_lost_logs
from graftwork.training.run import RunFacts, WritesRunDown
from graftwork.training.run_directory import clear, discard, latest, locked, states
from graftwork.training.strategy import MegatronStrategy
from graftwork.training.summary import Summary
from graftwork.training.trainee import callbacks_of, trainee


def finetune(
    model: LightningModule,
    trainer: Trainer,
    data: LightningDataModule,
    peft: Optional[list[PEFT]] = None,
    optim: Optional[AdamW] = None,
    resume: bool = True,
    seed: int = 1234,
    recipe_text: Optional[str] = None,
    recipe_changes: Optional[str] = None,
    allow_changes: Optional[list[str]] = None,
    samples: int = 3,
    early_stopping: Optional[int] = None,
    loggers: Optional[list[str]] = None,
) -> Summary:
    """Train ``model`` on ``data`` with a stack of transforms and return the fields of ``summary.json``.

    The run directory is ``trainer.default_root_dir``: ``adapter/`` (or ``model/`` in full fine-tuning), ``logs/``,
    ``summary.json``, ``loss.png``, ``report.html``, ``checkpoints/`` (training states). Raises GraftworkError with one
    sentence.

    Args:
        model: The base model, and the precision in which it is held.
        trainer: Lightning's trainer: steps, validations, devices, and the run directory as ``default_root_dir``.
        data: Files of rows, how they are put to the model and batched.
        peft: Adapters, inner to outer; None or [] is full fine-tuning.
        optim: AdamW, its learning rate and schedule; None is ``AdamW()``.
        resume: Go on from the run's newest training state; False deletes what is there and trains anew.
        seed: Decides initial adapter values, random base weights and dropout.
        recipe_text: Remembered by its hash and in the adapter; the command line sets it.
        recipe_changes: What was set beside the recipe's own values, for the report; the command line sets it.
        allow_changes: Fields, such as ``optim.lr``, in which a state may differ from the recipe; others are refused.
        samples: Rows of the validation data that are answered at each validation (``samples.jsonl``).
        early_stopping: Validations without a new best after which the run ends.
        loggers: Of csv, tensorboard, wandb, mlflow; default the first two, and csv is always there.
    """
    stack = as_stack(peft)
    _take_loggers(trainer, loggers, Path(trainer.default_root_dir).resolve())
    extra = [Samples(samples), *([] if early_stopping is None else [EarlyStop(early_stopping)])]
    seed_everything(seed)
    trainee(model).prepare(optim=optim or AdamW(), seed=seed)
    facts = RunFacts(seed, recipe_text, recipe_changes)
    report = equip(trainer, stack, facts, extra)
    _fit(model, trainer, data, facts, resume, allow_changes or ())
    return report.summary


def _fit(
    model: LightningModule,
    trainer: Trainer,
    data: LightningDataModule,
    facts: RunFacts,
    resume: bool,
    allow_changes: Sequence[str],
) -> None:
    """Train in the run directory, which is this run's alone meanwhile."""
    root = Path(trainer.default_root_dir).resolve()
    with locked(root) if trainer.is_global_zero else nullcontext(), _quiet(), quiet_writers():
        if trainer.is_global_zero:
            clear(root)
        resume_from = _resume_from(root, resume, trainer)
        if isinstance(trainer.strategy, MegatronStrategy):
            trainer.strategy.begin(facts, resume_from, allow_changes)
        with _fields_named(trainer):
            trainer.fit(model, datamodule=data, ckpt_path=resume_from)
        refuse_lost_logs(trainer)


def _take_loggers(trainer: Trainer, names: Sequence[str] | None, root: Path) -> None:
    """Give ``trainer`` the loggers of these names, or the usual ones where it has none that a user has set."""
    given = [logger for logger in trainer.loggers if not _is_default_logger(logger)]
    if names is not None or not given:
        trainer.loggers = [*given, *made(names, root, trainer.is_global_zero)]


def _resume_from(root: Path, resume: bool, trainer: Trainer) -> str | None:
    """Return the training state to go on from, None to start anew."""
    found = latest(root) if resume and isinstance(trainer.strategy, MegatronStrategy) else None
    if found is not None and trainer.is_global_zero:
        print(f"resuming from {found}", flush=True)
    if not resume and trainer.is_global_zero:
        for path in states(root):
            discard(path)
    return str(found) if found is not None else None


@contextmanager
def _fields_named(trainer: Trainer) -> Iterator[None]:
    """Say of Lightning's refusal of an interval what is valid."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, GraftworkError) or "val_check_interval" not in str(error):
            raise
        raise ConfigError(
            f"trainer.val_check_interval={trainer.val_check_interval} is more than the steps of one pass over the "
            "training rows; set trainer.check_val_every_n_epoch=None to count steps over all passes."
        ) from error


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


def equip(trainer: Trainer, stack: Sequence[PEFT], facts: RunFacts, extra: Sequence[Callback] = ()) -> Report:
    """Give ``trainer`` what every run has; a callback or logger that the user has set is kept, not doubled."""
    given = callbacks_of(trainer)
    callbacks: list[Callback] = [c for c in given if not _is_default(c)]
    bar = any(type(c) in (TQDMProgressBar, RichProgressBar) for c in given)
    states_too = [TrainingState] if isinstance(trainer.strategy, MegatronStrategy) else []
    kinds = (Room, Throughput, SelfCheck, AdapterCheckpoint, Report, *([Banner, Progress] if bar else []), *states_too)
    for one in (*(kind() for kind in kinds), *extra):
        if not any(isinstance(c, type(one)) for c in callbacks):
            callbacks.append(one)
    # The room is asked for before anything else; a state is saved last: it holds what the others have become.
    callbacks.sort(key=lambda c: isinstance(c, TrainingState) - isinstance(c, Room))
    given[:] = [*(t for t in stack if t not in callbacks), *callbacks]
    for callback in callbacks:
        if isinstance(callback, WritesRunDown):
            callback.begin(facts)
    return next(c for c in callbacks if isinstance(c, Report))


def _is_default(callback: Callback) -> bool:
    """Tell the callbacks that Lightning adds unasked from those that a user has configured."""
    if type(callback) is ModelCheckpoint:
        return callback.dirpath is None and callback.monitor is None
    return type(callback) in (TQDMProgressBar, RichProgressBar, ModelSummary, RichModelSummary)


def _is_default_logger(logger: Logger) -> bool:
    return isinstance(logger, CSVLogger | TensorBoardLogger) and logger.name == "lightning_logs"
