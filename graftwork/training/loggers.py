"""The run's own logs: a disk that takes no more lines ends the logging, not the training."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyExperiment

from graftwork.errors import CheckpointError


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


def own_loggers(root: Path) -> list[Logger]:
    """Return the loggers of a run: both write into one directory below ``logs/``."""
    csv = CSVLog(root, name="logs")
    return [csv, TensorBoardLog(root, name="logs", version=csv.version)]


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
