"""Training state as a directory: everything that resuming needs, written whole or not at all by all ranks together.

``tensors/`` (trained parameters, moments, fp32 masters: a megatron-core distributed checkpoint), ``state.json`` (step,
layout, whose it is, a checksum of every file), ``trainer.pt`` (loops, callbacks, schedule, data position),
``random-*.pt`` (generators of each rank).
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch
from pydantic import BaseModel, Field

from graftwork.atomic import atomic_directory
from graftwork.cache import sha256
from graftwork.errors import CheckpointError, quoted
from graftwork.jsonfile import named_inside, read_object, refuse_outside, validated
from graftwork.layout import Layout
from graftwork.parallel import sharded_files
from graftwork.parallel.collective import agreed, all_gather_objects, broadcast_object, world_rank, world_size
from graftwork.training.optimizer.update import Update
from graftwork.training.state import random_state
from graftwork.training.state.identity import Identity
from graftwork.training.state.trainer_file import TRAINER, read_trainer

STATE, TENSORS = "state.json", "tensors"
FORMAT = 2
ELSEWHERE = ("state_dict", "optimizer_states")
"""Keys of Lightning's checkpoint that are written as sharded tensors instead."""

UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    AssertionError,
    MemoryError,
    pickle.UnpicklingError,
)
"""What json and torch raise for damaged files, and Lightning for the contents of such."""

T = TypeVar("T")


class Facts(BaseModel):
    """The contents of ``state.json``: what must be known before anything else is read.

    States of earlier versions have no ``identity``, no ``files`` (SHA-256 of every file by its path) and no
    ``checksum`` (of everything else in this file).
    """

    format: int
    step: int = Field(ge=0)
    optimizer_step: float = Field(ge=0)
    layout: dict[str, object]
    world_size: int = Field(ge=1)
    megatron_core: str
    identity: Optional[Identity] = None
    files: Optional[dict[str, str]] = None
    checksum: Optional[str] = None


def save(
    path: Path, checkpoint: dict[str, Any], update: Update, layout: Layout, identity: Identity | None = None
) -> None:
    """Write Lightning's ``checkpoint`` with the tensors of every rank; on any rank's error no rank goes on."""
    steps = update.steps_made()
    with _shared_directory(path) as directory:
        _write(path, lambda: torch.save(random_state.capture(), directory / _random_file()))
        try:
            sharded_files.save(update.state(), directory / TENSORS)
        except sharded_files.DamagedError as problem:
            raise _unwritable(path, problem) from problem
        _write(path, lambda: _write_trainer(directory, checkpoint) if world_rank() == 0 else None)
        own = _write(path, lambda: {name: sha256(directory / name) for name in _names(directory) if _is_mine(name)})
        files = {name: value for found in all_gather_objects(own) for name, value in found.items()}
        facts = Facts(
            format=FORMAT,
            step=checkpoint["global_step"],
            optimizer_step=steps,
            layout=asdict(layout),
            world_size=world_size(),
            megatron_core=version("megatron-core"),
            identity=identity,
            files=files,
        )
        _write(path, lambda: _write_facts(directory, facts) if world_rank() == 0 else None)


def read_common(path: Path) -> tuple[dict[str, Any], Facts]:
    """Return (Lightning's checkpoint, the contents of ``state.json``); the same CheckpointError on every rank."""

    def read() -> tuple[dict[str, Any], Facts]:
        _check_entries(path)
        state = _facts(path)
        _check_files(path, state)
        return read_trainer(path, state.step), state

    checkpoint, state = _read(path, read)
    return {**checkpoint, "state_dict": {}, "optimizer_states": [{}]}, state


def unreadable(path: Path, reason: str) -> CheckpointError:
    """Return the error of a training state that cannot be read, which says what to do about it."""
    return CheckpointError(
        f"the training state {str(path)!r} cannot be read ({reason}); "
        "delete that directory to resume from the one before."
    )


def _facts(path: Path) -> Facts:
    """Return ``state.json``, whose checksum must be right where it has one."""
    raw = read_object(path / STATE, sharded_files.DamagedError)
    found = raw.get("format")
    if isinstance(found, int) and found != FORMAT:
        raise CheckpointError(f"the training state {str(path)!r} has format {found}, this version reads {FORMAT}.")
    state = validated(raw, Facts, STATE, sharded_files.DamagedError)
    if (state.checksum is None) != (state.files is None) or (
        state.files is not None and _checksum(raw) != state.checksum
    ):
        raise sharded_files.DamagedError(f"{STATE} was changed: its checksum does not match")
    return state


def _check_entries(path: Path) -> None:
    """Refuse what is no file of the state's own: a pipe would be waited for, a link leads elsewhere."""
    for entry in sorted(path.rglob("*")):
        if entry.is_symlink():
            refuse_outside(path, entry, sharded_files.DamagedError)
        if entry.exists() and not entry.is_dir() and not entry.is_file():
            raise sharded_files.DamagedError(f"{quoted(entry.name)} is not a regular file")


def _check_files(path: Path, state: Facts) -> None:
    """Compare every file with its checksum, each rank its share; states of earlier versions have none."""
    for place, (name, wanted) in enumerate(sorted((state.files or {}).items())):
        folder, _, plain = name.rpartition("/")
        file = named_inside(path / TENSORS if folder == TENSORS else path, plain, STATE, sharded_files.DamagedError)
        if place % world_size() == world_rank() and sha256(file) != wanted:
            raise sharded_files.DamagedError(f"{quoted(name)} was changed: its checksum does not match")


def _checksum(facts: dict[str, object]) -> str:
    rest = {key: value for key, value in facts.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _names(directory: Path) -> list[str]:
    return [str(p.relative_to(directory)) for p in sorted(directory.rglob("*")) if p.is_file()]


def _is_mine(name: str) -> bool:
    """Tell whether this rank wrote a file: others may not see it yet where the file system is a network's."""
    plain = Path(name).name
    mine = plain == _random_file() or plain.startswith(f"__{world_rank()}_")
    return mine or (world_rank() == 0 and not plain.startswith(("__", "random-")))


def read_random_state(path: Path, state: Facts, layout: Layout) -> random_state.State | None:
    """Return this rank's generators, None when the state was saved in another layout (each rank then starts anew)."""
    if state.layout != asdict(layout) or state.world_size != world_size():
        return None
    return _read(path, lambda: random_state.read(path / _random_file()))


def read_weights(path: Path, state: Facts, update: Update) -> None:
    """Fill the trained parameters; CheckpointError, on every rank, when they do not fit the model."""
    with _damage_explained(path, state):
        update.load_weights(path / TENSORS, str(path))


def read_optimizer(path: Path, state: Facts, update: Update) -> None:
    """Fill the optimizer's state bit for bit; learning rate and other settings stay the recipe's."""
    if state.optimizer_step:
        with _damage_explained(path, state):
            update.load_optimizers(state.optimizer_step, path / TENSORS, str(path))


def _write_trainer(directory: Path, checkpoint: dict[str, Any]) -> None:
    torch.save({key: value for key, value in checkpoint.items() if key not in ELSEWHERE}, directory / TRAINER)


def _write_facts(directory: Path, facts: Facts) -> None:
    raw = facts.model_dump(exclude={"checksum"})
    (directory / STATE).write_text(json.dumps({**raw, "checksum": _checksum(raw)}))


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


def _write(path: Path, action: Callable[[], T]) -> T:
    return agreed(action, (OSError, RuntimeError), lambda problem: _unwritable(path, problem))


def _read(path: Path, action: Callable[[], T]) -> T:
    """Return what ``action`` reads; when any rank cannot, the same error on every rank."""
    try:
        return agreed(action, UNREADABLE, lambda problem: sharded_files.DamagedError(_reason(problem)))
    except sharded_files.DamagedError as problem:
        raise unreadable(path, str(problem).rstrip(".")) from problem


@contextmanager
def _damage_explained(path: Path, state: Facts) -> Iterator[None]:
    """Say what to do about tensors that cannot be read; every rank has the same error already."""
    try:
        yield
    except sharded_files.DamagedError as problem:
        here, there = version("megatron-core"), state.megatron_core
        other = "" if here == there else f"; megatron-core {there} wrote it, this is {here}"
        raise unreadable(path, f"{problem}{quoted(other, bare=True)}") from problem


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {quoted(str(problem), bare=True)}"


def _unwritable(path: Path, problem: Exception) -> CheckpointError:
    return CheckpointError(
        f"the training state {str(path)!r} cannot be written ({problem}); nothing half-written was left and the "
        "state before it is intact."
    )


def _random_file() -> str:
    return f"random-{world_rank():05}.pt"
