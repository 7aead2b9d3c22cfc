"""The directory of one run: one process at a time, its training states in order."""

import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from graftwork.errors import ConfigError

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
    """Hold ``root`` for this process; ConfigError when another run holds it. The kernel frees it even after a kill."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"another run ({file.read().strip() or 'unknown process'}) is using {str(root)!r}: "
                "wait for it to end or choose another name."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            # Some network file systems have no locks; running unlocked there beats not running.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            # Closing is not enough: a forked checkpoint writer may still hold a copy of the descriptor.
            with suppress(OSError):  # where there are no locks
                fcntl.flock(file, fcntl.LOCK_UN)
