"""A task that writes a run directory as a training does, small enough to launch many of: no torch."""

import hashlib
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from graftwork.endings import Interrupted, code_of
from graftwork.errors import ConfigError, DataError

PATIENCE = 600.0


@dataclass
class Place:
    """Stands for the trainer."""

    default_root_dir: str


@dataclass
class Rate:
    """Stands for the optimizer."""

    lr: float = 0.1

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr={self.lr} must be above 0.")


def learn(
    trainer: Place,
    optim: Rate,
    seconds: float = 0.0,
    fail: bool = False,
    wait_for: Optional[str] = None,
    resume: bool = True,
    recipe_text: Optional[str] = None,
) -> dict[str, object]:
    """Note when it began and ended and write ``summary.json``; a stop saves a state.

    In between it waits for ``seconds``, and for the file ``wait_for``.
    """
    root = Path(trainer.default_root_dir)
    root.mkdir(parents=True, exist_ok=True)

    def stop(number: int, frame: object) -> None:
        (root / "checkpoints").mkdir(exist_ok=True)
        raise Interrupted("stopped after step 3, its state is saved", code_of(number, saved=True))

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    _note(root, "began")
    if fail:
        raise DataError("train.jsonl, line 3: field 'output' is missing; valid: input, output.")
    deadline = time.monotonic() + PATIENCE
    while wait_for is not None and not Path(wait_for).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(seconds)
    _note(root, "ended")
    digest = hashlib.sha256((recipe_text or "").encode()).hexdigest()
    summary = {"recipe_sha256": digest, "steps": 1, "train_loss": 2.0, "val_loss": optim.lr}
    (root / "summary.json").write_text(json.dumps(summary))
    return summary


def _note(root: Path, what: str) -> None:
    with open(root / what, "a") as file:
        file.write(f"{time.time()}\n")
