"""A training that waits at one step for the test to act: what happens in mid-run is no matter of speed."""

import time
from pathlib import Path
from typing import Optional

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

PATIENCE = 240.0


class Pause(Callback):
    """Rank 0 says in ``directory`` that the step ``step`` has begun, and waits there until ``go()``.

    ``crash``: the rank that raises instead, a bug in the middle of a step.
    """

    def __init__(self, directory: str, step: int = 3, crash: Optional[int] = None) -> None:
        self.directory, self.step, self.crash = Path(directory), step, crash

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Wait, or crash, at the beginning of the step."""
        if trainer.global_step + 1 != self.step:
            return
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank == self.crash:
            raise ZeroDivisionError("a bug in the middle of a step")
        if rank == 0 and self.crash is None:
            (self.directory / "reached").touch()
            end = time.monotonic() + PATIENCE
            while not (self.directory / "go").exists() and time.monotonic() < end:
                time.sleep(0.1)


def go(directory: Path) -> None:
    """Let every training that waits in ``directory``, or will, go on."""
    (directory / "go").touch()
