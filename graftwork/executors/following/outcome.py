"""How a launched task ended: its own error, the stop it was asked for, or the end of its log."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from graftwork import errors
from graftwork.endings import Interrupted, stop_told
from graftwork.errors import GraftworkError, LaunchError
from graftwork.executors.process.task import CRASHED

TAIL_LINES = 15
RANK_PREFIX = re.compile(r"^\[default(\d+)\]:\s?")
"""What torchrun puts before a line of the rank with that number on its machine.

Not torch's own ``[rank0]:``, which stands before the lines of a traceback alone."""

USER_ERROR = re.compile(r"graftwork\.errors\.(\w+): (.+)$")
_ENDED_BADLY = ("FAILED", "CANCELLED")
_ROOT_CAUSE = re.compile(
    r"Root Cause.*\n\[0\]:\n.*\n.*\n"
    r"\s+rank\s*: (\d+).*\n\s+exitcode\s*: -\d+.*\n.*\n\s+traceback\s*: Signal \d+ \((\w+)\)"
)
"""torchrun's epilogue of a rank that a signal has ended: rank and signal."""

_ATTEMPT = re.compile(r"^log-.*_(\d+)\.out$")
"""The log of a Slurm job's step, with the number of times that the job was requeued before."""


class TaskState(TypedDict):
    """What NeMo Run tells of a task: its torchx state (or the state's name), and the directory with its logs.

    ``words``: the scheduler's own word for the state, where it has one.
    """

    status: object
    local_dir: str
    words: NotRequired[str]


def check(status: Mapping[str, TaskState], detached: bool = False) -> None:
    """Raise for the first task of a status that did not succeed; a detached one may still be on its way."""
    for task, state in status.items():
        outcome = getattr(state["status"], "name", str(state["status"]))
        if outcome in _ENDED_BADLY or (outcome != "SUCCEEDED" and not detached):
            raise failure(task, state.get("words", outcome), Path(state["local_dir"]))


def failure(task: str, outcome: str, directory: Path) -> GraftworkError | Interrupted:
    """Return what a failed task ended with: its own GraftworkError or stop if its log shows one, else LaunchError."""
    lines = log_lines(directory)
    for line in reversed(lines):
        if found := USER_ERROR.search(line):
            kind = getattr(errors, found.group(1), GraftworkError)
            return kind(found.group(2))
    told = f"task {task!r} ended as {outcome}"
    if found := _ROOT_CAUSE.search("\n".join(_written(directory))):
        return LaunchError(f"{told}: rank {found[1]} was ended by {found[2]}; its log is in {directory}")
    if (stop := stop_told(lines)) and not any(line.startswith("Traceback ") for line in lines):
        return stop
    shown = "\n".join("  " + line for line in lines[-TAIL_LINES:]) or "  (no output)"
    first = next((found for found in map(CRASHED.match, lines) if found), None)
    cause = f"\nthe cause, on rank {first[1]}: {first[2]}" if first else ""
    return LaunchError(f"{told}; its log is in {directory} and ends with:\n{shown}{cause}")


def log_lines(directory: Path) -> list[str]:
    """Return the lines of the task's logs, the most recently written file last.

    Under torchrun only what the ranks wrote, without their prefixes: the launcher's own epilogue hides the cause.
    """
    lines = _written(directory)
    ranks = [RANK_PREFIX.sub("", line) for line in lines if RANK_PREFIX.match(line)]
    return ranks or lines


def _written(directory: Path) -> list[str]:
    found = [p for pattern in ("**/*.log", "**/*.out") for p in directory.glob(pattern) if p.is_file()]
    if attempts := [p for p in found if _ATTEMPT.search(p.name)]:
        # Beside them stand the batch script's own trace, and what attempts before a requeue have written.
        newest = max(_attempt(p) for p in attempts)
        found = [p for p in attempts if _attempt(p) == newest]
    files = sorted((p for p in found if p.stat().st_size), key=lambda p: (p.stat().st_mtime_ns, p.name))
    return [line for p in files for line in p.read_text(errors="replace").splitlines() if line.strip()]


def _attempt(log: Path) -> int:
    found = _ATTEMPT.search(log.name)
    return int(found[1]) if found else 0
