"""Progress for people: a bar on a terminal, a line now and then in a log file."""

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT
from tqdm import tqdm

from graftwork.training.callbacks.throughput import Throughput
from graftwork.training.summary import peak_memory_bytes
from graftwork.training.trainee import callbacks_of


class Progress(ProgressBar):
    """Steps, loss, learning rate, tokens/s, peak memory of this process and time left; rank 0 only.

    Args:
        every_seconds: Where stderr is no terminal (Slurm, CI), at most one line in this many seconds; the first and
            the last step and every validation always get theirs.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._enabled = True
        self._bar: tqdm | None = None
        self._last_line = -math.inf

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line without tearing the bar."""
        text = kwargs.get("sep", " ").join(map(str, args))
        tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def tell(self, text: str) -> None:
        """Print a line where progress is shown."""
        if self._enabled:
            self.print(text)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar where there is a terminal."""
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=_total(trainer), initial=trainer.global_step, unit="step", dynamic_ncols=True, smoothing=0.1
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Show the step that has just ended."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(_parts(trainer)), refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)
        elif self._due(trainer):
            self._last_line = time.monotonic()
            print(line(trainer), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the validation loss."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and not trainer.sanity_checking:
            tell(trainer, f"step {trainer.global_step}: val_loss {float(loss):.4f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error stands on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _due(self, trainer: Trainer) -> bool:
        edge = self._last_line == -math.inf or trainer.global_step == _total(trainer)
        return edge or time.monotonic() - self._last_line >= self.every_seconds


def tell(trainer: Trainer, text: str) -> None:
    """Print a line among those of ``trainer``'s progress, on the first rank; nothing where none is shown."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, Progress) and trainer.is_global_zero:
            callback.tell(text)


def line(trainer: Trainer) -> str:
    """Return one line on the current step."""
    total = _total(trainer)
    where = f"step {trainer.global_step}" + (f"/{total}" if total else "")
    rate = _throughput(trainer)
    parts = _parts(trainer)
    if total and rate is not None and rate.seconds_per_step:
        parts.append(f"{clock((total - trainer.global_step) * rate.seconds_per_step)} left")
    return f"{where}: " + ", ".join(parts)


def clock(seconds: float) -> str:
    """Return ``m:ss`` or ``h:mm:ss``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _parts(trainer: Trainer) -> list[str]:
    metrics = trainer.callback_metrics
    parts = [f"loss {float(metrics['train_loss']):.4f}"] if "train_loss" in metrics else []
    rates = [float(v) for k, v in metrics.items() if k == "lr" or k.startswith("lr/")]
    parts += [f"lr {max(rates):.2e}"] if rates else []
    rate = _throughput(trainer)
    parts += [f"{rate.average:,.0f} tokens/s"] if rate is not None and rate.average else []
    return [*parts, f"{peak_memory_bytes() / 1e9:.2f} GB"]


def _throughput(trainer: Trainer) -> Throughput | None:
    return next((c for c in callbacks_of(trainer) if isinstance(c, Throughput)), None)


def _total(trainer: Trainer) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None
