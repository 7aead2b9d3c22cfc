"""Tasks small enough to launch for real: importable by a child process, no torch."""

import os
import signal
import time
from pathlib import Path
from typing import Optional

from graftwork.endings import Interrupted, code_of
from graftwork.errors import DataError


def write_ranks(directory: str, fail: Optional[str] = None) -> str:
    """Write one file per rank holding its OMP_NUM_THREADS; then fail as a user (``data``) or as a bug (``bug``)."""
    rank = os.environ.get("RANK", "0")
    Path(directory, f"rank{rank}").write_text(os.environ["OMP_NUM_THREADS"])
    if fail:
        meet(Path(directory), int(os.environ.get("WORLD_SIZE", "1")))
    if fail == "data":
        raise DataError("train.jsonl, line 3: field 'output' is missing; valid: input, output.")
    if fail == "bug":
        raise ZeroDivisionError("a bug")
    return rank


def meet(directory: Path, ranks: int, patience: float = 60.0) -> None:
    """Wait until every rank has written its file: torchrun ends the others as soon as one fails."""
    deadline = time.monotonic() + patience
    while len(list(directory.glob("rank*"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.01)


def ask(trainer: int) -> None:
    """Say that it ran; a verb with a trainer is confirmed first."""
    print("asked")


def answer_rows(count: int, output: Optional[str] = None) -> list[dict[str, str]]:
    """Return rows, as the verbs that answer do."""
    return [{"output": f"é {n}"} for n in range(count)]


def rest(directory: str, patience: float = 600.0) -> None:
    """Write this process's id, and its parent's, into a file per rank and do nothing for long."""
    rank = os.environ.get("RANK", "0")
    part = Path(directory, f".rank{rank}")
    part.write_text(f"{os.getpid()} {os.getppid()}")
    part.rename(Path(directory, f"rank{rank}"))
    time.sleep(patience)


def stop_saved(directory: str) -> None:
    """Do nothing for long, and stop as a training does: with its state saved."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted("stopped after step 3, its state is saved", code_of(number, saved=True))

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    rest(directory)


def stubborn(directory: str) -> None:
    """Do nothing for long, and take no notice of a request to stop, but for a file that says that there was one."""

    def note(number: int, frame: object) -> None:
        Path(directory, f"asked{os.environ.get('RANK', '0')}").touch()

    signal.signal(signal.SIGINT, note)
    rest(directory)
