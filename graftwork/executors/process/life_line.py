"""The line between a launcher and the container it waits for: a locked file in the job's directory.

The lock says that the launcher lives, whatever ends it; what is written into the file are the signals it passes on.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "launcher"
"""The file's name in the job's directory."""


@contextmanager
def held(directory: Path) -> Iterator[Path]:
    """Hold the line of the job in ``directory`` for as long as the block runs, and yield its file."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield Path(file.name)


def pass_on(directory: Path, number: int) -> bool:
    """Pass signal ``number`` on to the job in ``directory``; False when it has no line."""
    path = directory / NAME
    if not path.exists():
        return False
    with path.open("a") as file:
        file.write(f"{number}\n")
    return True


def is_held(path: Path) -> bool:
    """Whether the process that made the line is still there."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:  # the job's directory was removed
        return False
    return False


def passed_on(path: Path) -> list[int]:
    """Return the signals that were passed on so far."""
    try:
        return [int(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
