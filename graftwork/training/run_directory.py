"""The directory of one run: one process at a time, its training states in order."""

import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from graftwork.atomic import clear_leftovers
from graftwork.errors import CheckpointError, ConfigError, quoted

CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step-(\d{8,})")


def state_path(root: Path, step: int) -> Path:
    """Return where the training state of ``step`` goes."""
    return root / CHECKPOINTS / f"step-{step:08}"


def states(root: Path) -> list[Path]:
    """Return the training states in ``root``, oldest first, without the unfinished ones (their names are hidden)."""
    folder = root / CHECKPOINTS
    found = [p for p in folder.iterdir() if _STEP.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def latest(root: Path) -> Path | None:
    """Return the newest training state, None when there is none."""
    return next(reversed(states(root)), None)


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` states, and what killed processes left half-written."""
    for path in states(root)[: -keep or None]:
        discard(path)
    _clear_states(root)


def clear(root: Path) -> None:
    """Delete what killed processes left half-written in ``root``; only who holds the lock may."""
    clear_leftovers(root)
    _clear_states(root)


def _clear_states(root: Path) -> None:
    folder = root / CHECKPOINTS
    for path in folder.glob(".*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a directory so that a kill in the middle leaves no visible part of it."""
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold ``root`` for this process; ConfigError when another run holds it. The kernel frees it even after a kill.

    Raises CheckpointError when ``root`` cannot be written.
    """
    with _lock_file(root) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run ({quoted(_holder(file), bare=True)}) is using {str(root)!r}: "
                "wait for it to end or choose another name."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            # Some network file systems have no locks; running unlocked there beats not running.
        with suppress(OSError):  # a full disk: the name of the holder is for people only
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            # Closing is not enough: a forked checkpoint writer may still hold a copy of the descriptor.
            with suppress(OSError):  # where there are no locks
                fcntl.flock(file, fcntl.LOCK_UN)


def _lock_file(root: Path) -> FileIO:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return open(root / ".lock", "ab+", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"the run directory {quoted(root)} cannot be written ({error.strerror}); choose another one "
            "(trainer.default_root_dir)."
        ) from error


def _holder(file: FileIO) -> str:
    file.seek(0)
    return file.read(200).decode(errors="replace").strip() or "unknown process"
