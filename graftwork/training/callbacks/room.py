"""Room on the disk, asked for before the first step: a full disk at the end would lose the result."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from graftwork.errors import CheckpointError, quoted
from graftwork.parallel.collective import agreed, world_rank
from graftwork.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from graftwork.training.callbacks.training_state import TrainingState
from graftwork.training.run_directory import states
from graftwork.training.summary import whole
from graftwork.training.trainee import callbacks_of, trainee

MOMENTS, MASTER = 8, 4
"""Bytes that the optimizer keeps of each trained number: two fp32 moments, and an fp32 master of a narrower weight."""
ARTIFACT = 4
"""Bytes of one number in an adapter directory, which is fp32."""


class Need(NamedTuple):
    """So many bytes will be written to ``directory``."""

    what: str
    directory: Path
    size: int


class Room(Callback):
    """Refuses to begin where the disk has less room than the result and the training states will take.

    Counted are the exported model, or ``adapter/`` and ``adapter-last/``, and two training states: a state is kept
    until the next one is whole. States that stand there already, from the run that is resumed, have their room.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare; every rank raises the CheckpointError that the first one finds."""
        needs = needs_of(trainer, pl_module)
        agreed(lambda: check(needs) if world_rank() == 0 else None)


def needs_of(trainer: Trainer, pl_module: LightningModule) -> list[Need]:
    """Return what the run will write; collective over all ranks."""
    root = Path(trainer.default_root_dir).resolve()
    parameters = list(pl_module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    found = []
    for callback in callbacks_of(trainer):
        if isinstance(callback, AdapterCheckpoint):
            adapters = bool(trainee(pl_module).adapters)
            size = 2 * whole(trained, lambda _: ARTIFACT) if adapters else whole(parameters, nn.Parameter.element_size)
            place = Path(callback.directory or root).resolve()
            found.append(Need("adapter/ and adapter-last/" if adapters else "model/", place, size))
        if isinstance(callback, TrainingState) and trainer.max_steps != trainer.global_step:
            count = max(1, 2 - len(states(root)))
            found.append(Need(f"{count} training state(s)", root, count * whole(trained, state_bytes)))
    return found


def state_bytes(parameter: nn.Parameter) -> int:
    """Return the bytes that a training state keeps of one element: the weight and what the optimizer has of it."""
    width = parameter.element_size()
    return width + MOMENTS + (MASTER if width < MASTER else 0)


def check(needs: list[Need]) -> None:
    """Raise CheckpointError for a disk that cannot take what goes to it."""
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(os.stat(_existing(need.directory)).st_dev, []).append(need)
    for held in disks.values():
        place, needed = held[0].directory, sum(need.size for need in held)
        free = shutil.disk_usage(_existing(place)).free
        if needed > free:
            parts = ", ".join(f"{need.what} {need.size:,}" for need in held)
            raise CheckpointError(
                f"the disk of {quoted(place)} has {free:,} bytes free and the run needs {needed:,} ({parts}): "
                "free some space or choose a directory on another disk (trainer.default_root_dir)."
            )


def _existing(directory: Path) -> Path:
    return next(one for one in (directory, *directory.parents) if one.exists())
