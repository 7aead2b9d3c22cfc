"""The run's own logs: a disk that takes no more lines ends the logging, not the training."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment

from graftwork.errors import CheckpointError, ConfigError, quoted, suggest


class _Forgiving:
    """Tries to write until it fails once; ``problem`` is then what was met."""

    problem: OSError | None = None

    def attempt(self, write: Callable[..., object], *args: object) -> None:
        """Call ``write`` unless an earlier call has failed."""
        if self.problem is not None:
            return
        try:
            write(*args)
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        """Remember and tell that lines are lost from here on."""
        self.problem = error
        print(f"logs/ cannot be written any more ({error.strerror or error}); the training goes on.", flush=True)


class CSVLog(_Forgiving, CSVLogger):
    """``metrics.csv``."""

    @property
    def experiment(self) -> Any:
        """The writer, or one that does nothing when it cannot be made."""
        try:
            return super().experiment
        except OSError as error:
            self.lose(error)
            return DummyExperiment()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Try."""
        self.attempt(lambda: super(CSVLog, self).log_hyperparams(*args, **kwargs))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Try."""
        self.attempt(super().log_metrics, metrics, step)

    def save(self) -> None:
        """Try."""
        self.attempt(super().save)

    def finalize(self, status: str) -> None:
        """Try."""
        self.attempt(super().finalize, status)


class TensorBoardLog(_Forgiving, TensorBoardLogger):
    """TensorBoard's event file."""

    @property
    def experiment(self) -> Any:
        """The writer, or one that does nothing when it cannot be made."""
        try:
            return super().experiment
        except OSError as error:
            self.lose(error)
            return DummyExperiment()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Try."""
        self.attempt(lambda: super(TensorBoardLog, self).log_hyperparams(*args, **kwargs))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Try."""
        self.attempt(super().log_metrics, metrics, step)

    def save(self) -> None:
        """Try."""
        self.attempt(super().save)

    def finalize(self, status: str) -> None:
        """Try."""
        self.attempt(super().finalize, status)


LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
"""Names of loggers."""
OF_EVERY_RANK = ("csv", "tensorboard")


def made(names: Sequence[str] | None, root: Path, first_rank: bool) -> list[Logger]:
    """Return the loggers of a run in ``root``: ``metrics.csv`` always, TensorBoard's events unless others are named.

    Only the first rank has those that open a database or a connection as soon as they are made.

    ``wandb`` and ``mlflow`` follow their own environment variables (``WANDB_MODE=offline``, ``WANDB_PROJECT``,
    ``MLFLOW_TRACKING_URI``) and keep what is local in ``logs/``. Raises ConfigError for an unknown name, a package that
    is not installed, and where they refuse the run.
    """
    wanted = ["csv", *(("tensorboard",) if names is None else names)]
    for name in wanted:
        if name not in LOGGERS:
            raise ConfigError(f"loggers names {quoted(name)}, which is none; {suggest(name, LOGGERS)}")
    csv = CSVLog(root, name="logs")
    makers: dict[str, Callable[[], Logger]] = {
        "csv": lambda: csv,
        "tensorboard": lambda: TensorBoardLog(root, name="logs", version=csv.version),
        "wandb": lambda: _wandb(root),
        "mlflow": lambda: _mlflow(root),
    }
    here = [name for name in dict.fromkeys(wanted) if first_rank or name in OF_EVERY_RANK]
    return [makers[name]() for name in here]


def _wandb(root: Path) -> Logger:
    _need("wandb")
    refused: type[Exception] = import_module("wandb.errors").Error
    project = os.environ.get("WANDB_PROJECT", "graftwork")
    logger = WandbLogger(name=root.name, save_dir=_logs(root), project=project)  # WANDB_MODE is wandb's own affair
    try:
        opened = logger.experiment  # now, and not after the model has been loaded
    except refused as error:
        raise ConfigError(
            f"wandb does not take this run ({quoted(str(error), 200, bare=True)}); log in with 'wandb login', or keep "
            "its figures here with WANDB_MODE=offline."
        ) from error
    assert opened is not None
    return logger


def _mlflow(root: Path) -> Logger:
    _need("mlflow")
    refused: type[Exception] = import_module("mlflow.exceptions").MlflowException
    place = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{_logs(root)}/mlflow.db")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "graftwork")
    try:
        return MLFlowLogger(experiment, run_name=root.name, tracking_uri=place)
    except refused as error:  # the place may hold a password and is not repeated
        raise ConfigError(f"mlflow does not take this run: {quoted(str(error), 200, bare=True)}") from error


def _logs(root: Path) -> Path:
    (root / "logs").mkdir(parents=True, exist_ok=True)
    return root / "logs"


def _need(package: str) -> None:
    if find_spec(package) is None:
        others = ", ".join(name for name in LOGGERS if name != package)
        raise ConfigError(
            f"loggers names {package!r}, whose package is not installed: pip install {package}, or choose of {others}."
        )


def refuse_lost_logs(trainer: Trainer) -> None:
    """Raise CheckpointError when lines were lost; called when everything else has been written."""
    for logger in trainer.loggers:
        if isinstance(logger, _Forgiving) and logger.problem is not None:
            reason = logger.problem.strerror or logger.problem
            raise CheckpointError(
                f"the training has ended and its results are whole, but lines of {str(trainer.log_dir)!r} are lost: "
                f"{reason}."
            )


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Keep the traceback of TensorBoard's writing thread off the terminal: what it met is told by its logger."""
    before = threading.excepthook

    def told(problem: threading.ExceptHookArgs) -> None:
        if type(problem.thread).__name__ != "_AsyncWriterThread" or not isinstance(problem.exc_value, OSError):
            before(problem)

    threading.excepthook = told
    try:
        yield
    finally:
        threading.excepthook = before
