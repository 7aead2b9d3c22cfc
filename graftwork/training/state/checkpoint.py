"""Training state as a directory: everything that resuming needs, written whole or not at all by all ranks together.

``tensors/`` (trained parameters, moments, fp32 masters: a megatron-core distributed checkpoint), ``state.json`` (step,
layout), ``trainer.pt`` (loops, callbacks, schedule, data position), ``random-*.pt`` (generators of each rank).
"""

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch

from graftwork.atomic import atomic_directory
from graftwork.errors import CheckpointError
from graftwork.layout import Layout
from graftwork.parallel import sharded_files
from graftwork.parallel.collective import agreed, broadcast_object, world_rank, world_size
from graftwork.training.optimizer.update import Update
from graftwork.training.state import random_state

STATE, TRAINER, TENSORS = "state.json", "trainer.pt", "tensors"
FORMAT = 2
ELSEWHERE = ("state_dict", "optimizer_states")
"""Keys of Lightning's checkpoint that are written as sharded tensors instead."""

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError)
"""What json and torch raise for damaged files."""

T = TypeVar("T")


class Facts(TypedDict):
    """The contents of ``state.json``: what must be known before anything else is read."""

    format: int
    step: int
    optimizer_step: float
    layout: dict[str, Any]
    world_size: int
    megatron_core: str


def save(path: Path, checkpoint: dict[str, Any], update: Update, layout: Layout) -> None:
    """Write Lightning's ``checkpoint`` with the tensors of every rank; on any rank's error no rank goes on."""
    steps = update.steps_made()
    with _shared_directory(path) as directory:
        _write(path, lambda: torch.save(random_state.capture(), directory / _random_file()))
        try:
            sharded_files.save(update.state(), directory / TENSORS)
        except sharded_files.DamagedError as problem:
            raise _unwritable(path, problem) from problem
        _write(path, lambda: _write_common(directory, checkpoint, steps, layout) if world_rank() == 0 else None)


def read_common(path: Path) -> tuple[dict[str, Any], Facts]:
    """Return (Lightning's checkpoint, the contents of ``state.json``); the same CheckpointError on every rank."""

    def read() -> tuple[dict[str, Any], Facts]:
        state: Facts = json.loads((path / STATE).read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"the training state {str(path)!r} has format {state['format']}, this version reads {FORMAT}."
            )
        return torch.load(path / TRAINER, weights_only=True), state

    checkpoint, state = _read(path, read)
    return {**checkpoint, "state_dict": {}, "optimizer_states": [{}]}, state


def read_random_state(path: Path, state: Facts, layout: Layout) -> random_state.State | None:
    """Return this rank's generators, None when the state was saved in another layout (each rank then starts anew)."""
    if state["layout"] != asdict(layout) or state["world_size"] != world_size():
        return None
    found: random_state.State = _read(path, lambda: torch.load(path / _random_file(), weights_only=True))
    return found


def read_weights(path: Path, state: Facts, update: Update) -> None:
    """Fill the trained parameters; CheckpointError, on every rank, when they do not fit the model."""
    with _damage_explained(path, state):
        update.load_weights(path / TENSORS, str(path))


def read_optimizer(path: Path, state: Facts, update: Update) -> None:
    """Fill the optimizer's state bit for bit; learning rate and other settings stay the recipe's."""
    if state["optimizer_step"]:
        with _damage_explained(path, state):
            update.load_optimizers(state["optimizer_step"], path / TENSORS, str(path))


def _write_common(directory: Path, checkpoint: dict[str, Any], optimizer_step: float, layout: Layout) -> None:
    kept = {key: value for key, value in checkpoint.items() if key not in ELSEWHERE}
    torch.save(kept, directory / TRAINER)
    state = Facts(
        format=FORMAT,
        step=checkpoint["global_step"],
        optimizer_step=optimizer_step,
        layout=asdict(layout),
        world_size=world_size(),
        megatron_core=version("megatron-core"),
    )
    (directory / STATE).write_text(json.dumps(state))


@contextmanager
def _shared_directory(path: Path) -> Iterator[Path]:
    """Yield one temporary directory to all ranks; it takes ``path``'s place when every rank has left well."""
    with ExitStack() as stack:

        def make() -> Path | None:
            if world_rank():
                return None
            made = stack.enter_context(atomic_directory(path))
            (made / TENSORS).mkdir()
            return made

        made = agreed(make, (OSError,), lambda problem: _unwritable(path, problem))
        yield Path(broadcast_object(str(made)))
        agreed(stack.close, (OSError,), lambda problem: _unwritable(path, problem))


def _write(path: Path, action: Callable[[], None]) -> None:
    agreed(action, (OSError, RuntimeError), lambda problem: _unwritable(path, problem))


def _read(path: Path, action: Callable[[], T]) -> T:
    """Return what ``action`` reads; when any rank cannot, the same error on every rank."""
    return agreed(action, UNREADABLE, lambda problem: _unreadable(path, str(problem)))


@contextmanager
def _damage_explained(path: Path, state: Facts) -> Iterator[None]:
    """Say what to do about tensors that cannot be read; every rank has the same error already."""
    try:
        yield
    except sharded_files.DamagedError as problem:
        here, there = version("megatron-core"), state.get("megatron_core")
        other = "" if here == there else f"; megatron-core {there} wrote it, this is {here}"
        raise _unreadable(path, f"{problem}{other}") from problem


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the training state {str(path)!r} cannot be read ({reason}); "
        "delete that directory to resume from the one before."
    )


def _unwritable(path: Path, problem: Exception) -> CheckpointError:
    return CheckpointError(
        f"the training state {str(path)!r} cannot be written ({problem}); nothing half-written was left and the "
        "state before it is intact."
    )


def _random_file() -> str:
    return f"random-{world_rank():05}.pt"
