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
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from graftwork.atomic import atomic_directory
from graftwork.errors import CheckpointError, GraftworkError
from graftwork.layout import Layout
from graftwork.parallel import sharded_files
from graftwork.parallel.collective import agree, broadcast_object
from graftwork.training.optimizer import shards
from graftwork.training.state import random_state

STATE, TRAINER, TENSORS = "state.json", "trainer.pt", "tensors"
FORMAT = 2
ELSEWHERE = ("state_dict", "optimizer_states")
"""Keys of Lightning's checkpoint that are written as sharded tensors instead."""

T = TypeVar("T")


def save(path: Path, checkpoint: dict[str, Any], module: Any, optimizers: list[Any], layout: Layout) -> None:
    """Write Lightning's ``checkpoint`` with the tensors of every rank; on any rank's error no rank goes on."""
    step = shards.optimizer_step(module, optimizers)
    with _shared_directory(path) as directory:
        _write(path, lambda: torch.save(random_state.capture(), directory / _random_file()))
        try:
            sharded_files.save(shards.state_to_save(module, optimizers), directory / TENSORS)
        except sharded_files.DamagedError as problem:
            raise _unwritable(path, problem) from problem
        if _rank() == 0:
            _write(path, lambda: _write_common(directory, checkpoint, step, layout))
        else:
            _write(path, lambda: None)


def read_common(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (Lightning's checkpoint, the contents of ``state.json``); the same CheckpointError on every rank."""

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        state = json.loads((path / STATE).read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"the training state {str(path)!r} has format {state['format']}, this version reads {FORMAT}."
            )
        return torch.load(path / TRAINER, weights_only=True), state

    checkpoint, state = _read(path, read)
    return {**checkpoint, "state_dict": {}, "optimizer_states": [{}]}, state


def read_random_state(path: Path, state: dict[str, Any], layout: Layout) -> random_state.State | None:
    """Return this rank's generators, None when the state was saved in another layout (each rank then starts anew)."""
    if state["layout"] != asdict(layout) or state["world_size"] != _world():
        return None
    return _read(path, lambda: torch.load(path / _random_file(), weights_only=True))


def read_weights(path: Path, state: dict[str, Any], module: Any) -> None:
    """Fill the trained parameters; CheckpointError, on every rank, when they do not fit the model."""
    with _damage_explained(path, state):
        shards.load_weights(module, path / TENSORS, str(path))


def read_optimizer(path: Path, state: dict[str, Any], module: Any, optimizer: Any) -> None:
    """Fill ``optimizer``'s state bit for bit; learning rate and other settings stay the recipe's."""
    if state["optimizer_step"]:
        with _damage_explained(path, state):
            shards.load_optimizer(module, optimizer, state["optimizer_step"], path / TENSORS, str(path))


def _write_common(directory: Path, checkpoint: dict[str, Any], optimizer_step: float, layout: Layout) -> None:
    kept = {key: value for key, value in checkpoint.items() if key not in ELSEWHERE}
    torch.save(kept, directory / TRAINER)
    state = {
        "format": FORMAT,
        "step": checkpoint["global_step"],
        "optimizer_step": optimizer_step,
        "layout": asdict(layout),
        "world_size": _world(),
        "megatron_core": version("megatron-core"),
    }
    (directory / STATE).write_text(json.dumps(state))


@contextmanager
def _shared_directory(path: Path) -> Iterator[Path]:
    """Yield one temporary directory to all ranks; it takes ``path``'s place when every rank has left well."""
    with ExitStack() as stack:
        made: Path | None = None
        error: GraftworkError | None = None
        if _rank() == 0:
            try:
                made = stack.enter_context(atomic_directory(path))
                (made / TENSORS).mkdir()
            except (GraftworkError, OSError) as problem:
                error = problem if isinstance(problem, GraftworkError) else _unwritable(path, problem)
        agree(error)
        yield Path(broadcast_object(str(made)))
        try:
            stack.close()
        except (GraftworkError, OSError) as problem:
            error = problem if isinstance(problem, GraftworkError) else _unwritable(path, problem)
        agree(error)


def _write(path: Path, action: Callable[[], None]) -> None:
    error: GraftworkError | None = None
    try:
        action()
    except (OSError, RuntimeError) as problem:
        error = _unwritable(path, problem)
    agree(error)


def _read(path: Path, action: Callable[[], T]) -> T:
    """Return what ``action`` reads; when any rank cannot, the same error on every rank."""
    error: GraftworkError | None = None
    result: Any = None
    try:
        result = action()
    except GraftworkError as refused:
        error = refused
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
        error = _unreadable(path, str(problem))
    agree(error)
    return result


@contextmanager
def _damage_explained(path: Path, state: dict[str, Any]) -> Iterator[None]:
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
    return f"random-{_rank():05}.pt"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
