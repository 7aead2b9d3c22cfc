"""Launch a recipe and check how it ended: NeMo Run itself reports success whatever the task did."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import fiddle as fdl
import nemo_run as run

from graftwork import errors
from graftwork.errors import ConfigError, GraftworkError, LaunchError
from graftwork.executors.local import local
from graftwork.recipes.show import with_text

TAIL_LINES = 15
_ENDED_BADLY = ("FAILED", "CANCELLED")
_USER_ERROR = re.compile(r"graftwork\.errors\.(\w+): (.+)$")
_RANK_VARIABLE = re.compile(r"((LOCAL|NODE|GROUP|ROLE)_)?RANK$|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE$|MASTER_|TORCHELASTIC_")
_RANK_PREFIX = re.compile(r"^\[\w+\]:\s?")


class TaskState(TypedDict):
    """What NeMo Run tells of a task: its torchx state (or the state's name), and the directory with its logs."""

    status: object
    local_dir: str


def launch(
    recipe: run.Partial,
    executor: run.Executor | run.Config | None = None,
    name: str = "graftwork",
    wait: bool = True,
    tail: bool = True,
    plugins: list[run.Plugin] | None = None,
) -> str:
    """Run ``recipe`` on ``executor`` (default: this machine) as one fresh experiment and return the experiment's id.

    ``wait=False`` detaches where the executor can (this machine cannot); ``tail`` shows the task's log while it runs.
    A task that fails raises the GraftworkError it ended with, or LaunchError with the end of its log.
    """
    task = task_name(name)
    with run.Experiment(
        task,
        executor=_built(executor),
        log_level="WARNING",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    ) as experiment:
        experiment.add(with_text(recipe), name=task, tail_logs=tail, plugins=plugins or None)
        try:
            with without_ranks():
                experiment.run(detach=not wait, tail_logs=tail)
        except OSError as error:
            raise LaunchError(f"could not start {task!r} on {experiment.executor.info()}: {error}") from error
    check(experiment.status(return_dict=True), detached=not wait)
    identity: str = experiment._id
    return identity


@contextmanager
def without_ranks() -> Iterator[None]:
    """Hide this process's own place in a process group: a child that inherits it would take its port and rank.

    Lightning leaves these variables behind after a training in the same process, as in a notebook.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _RANK_VARIABLE.match(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def check(status: Mapping[str, TaskState], detached: bool = False) -> None:
    """Raise for the first task of a status that did not succeed; a detached one may still be on its way."""
    for task, state in status.items():
        outcome = getattr(state["status"], "name", str(state["status"]))
        if outcome in _ENDED_BADLY or (outcome != "SUCCEEDED" and not detached):
            raise failure(task, outcome, Path(state["local_dir"]))


def failure(task: str, outcome: str, directory: Path) -> GraftworkError:
    """Return what a failed task ended with: its own GraftworkError if its log shows one, else LaunchError."""
    lines = log_lines(directory)
    for line in reversed(lines):
        if found := _USER_ERROR.search(line):
            kind = getattr(errors, found.group(1), GraftworkError)
            return kind(found.group(2))
    shown = "\n".join("  " + line for line in lines[-TAIL_LINES:]) or "  (no output)"
    return LaunchError(f"task {task!r} ended as {outcome}; its log is in {directory} and ends with:\n{shown}")


def log_lines(directory: Path) -> list[str]:
    """Return the lines of the task's logs, the most recently written file last.

    Under torchrun only what the ranks wrote, without their prefixes: the launcher's own epilogue hides the cause.
    """
    found = [p for pattern in ("**/*.log", "**/*.out") for p in directory.glob(pattern) if p.is_file()]
    files = sorted((p for p in found if p.stat().st_size), key=lambda p: (p.stat().st_mtime_ns, p.name))
    lines = [line for p in files for line in p.read_text(errors="replace").splitlines() if line.strip()]
    ranks = [_RANK_PREFIX.sub("", line) for line in lines if _RANK_PREFIX.match(line)]
    return ranks or lines


def task_name(name: str) -> str:
    """Return ``name`` as schedulers accept it; raises ConfigError when nothing usable is left."""
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    if not cleaned:
        raise ConfigError(f"{name!r} is no name for a run; use letters, digits, '-' and '_'.")
    return cleaned


def _built(executor: run.Executor | run.Config | None) -> run.Executor:
    if executor is None:
        return local()
    return fdl.build(executor) if isinstance(executor, fdl.Buildable) else executor
