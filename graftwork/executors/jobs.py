"""Runs that were started before, seen from any process: how far they are, what they print, how to stop them."""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import nemo_run as run
from fiddle.experimental import serialization
from nemo_run.config import get_nemorun_home, set_nemorun_home
from nemo_run.core.execution.launcher import FaultTolerance, Torchrun
from nemo_run.core.tunnel.client import Tunnel
from nemo_run.run.job import Job
from torchx.specs.api import AppState, is_terminal

from graftwork.endings import INTERRUPTED_EXIT_CODE, Interrupted
from graftwork.errors import ConfigError, LaunchError, quoted, suggest
from graftwork.executors.cluster.profile import find_profile
from graftwork.executors.following.accounting import accounts, ask
from graftwork.executors.following.joblog import JobLog, log_of
from graftwork.executors.following.outcome import RANK_PREFIX, USER_ERROR, failure

SHOWN = 10
"""So many of the newest experiments are listed."""

POLL_SECONDS = 2.0
CANCEL_SECONDS = 90.0
"""How long a cancelled job may take to save its state and end."""

_UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, ImportError, AssertionError),
    *(serialization.PyrefPolicyError, serialization.DeserializationError),
)
"""What NeMo Run raises for an experiment that is damaged, or of a program that is not here any more."""

_MOST_UNKNOWN = 30
"""So many times in a row nobody may know how a task is."""


@dataclass(frozen=True)
class State:
    """Where one task, or one element of a job array, stands.

    ``state`` is the scheduler's own word, ``words`` what more it tells, ``job`` its id there; ``directory`` holds the
    logs, on the machine that launched.
    """

    task: str
    state: str
    words: str
    job: str
    directory: Path
    is_over: bool
    succeeded: bool

    def __str__(self) -> str:
        told = f" ({self.words})" if self.words else ""
        return f"{self.task}  {self.state}{told}  job {self.job or '-'}  {self.directory}"


def status(experiment: Optional[str] = None) -> None:
    """Print how every task of an experiment is.

    Args:
        experiment: Id or name of an experiment; default the newest ones.
    """
    known = list(_known())[:SHOWN] if experiment is None else [experiment]
    if not known:
        print("nothing was launched yet.")
    for identity in known:
        found = find(identity)
        for state in states(found):
            print(f"{found._id}  {state}", flush=True)


def logs(experiment: Optional[str] = None, task: Optional[str] = None, follow: bool = False) -> None:
    """Print what the tasks of an experiment have written so far, all ranks and all attempts.

    Args:
        experiment: Id or name of an experiment; default the newest.
        task: One of several tasks.
        follow: Goes on until the last task has ended.
    """
    found = find(experiment)
    with _looking_at(found._id):
        for line in lines(found, task, follow):
            print(line, flush=True)


def attach(experiment: Optional[str] = None, task: Optional[str] = None) -> None:
    """Show a run as if it had been launched here: what rank 0 prints, then the end it comes to.

    Raises the GraftworkError a task ended with, or LaunchError with the end of its log. Ctrl-C only stops looking.

    Args:
        experiment: Id or name of an experiment; default the newest.
        task: One of several tasks.
    """
    found = find(experiment)
    with _looking_at(found._id):
        for line in lines(found, task, follow=True):
            if shown := _as_launched(line, _has_ranks(found)):
                print(shown, flush=True)
    for state in states(found, task):
        if not state.succeeded:
            raise failure(state.task, state.state, state.directory)


def cancel(experiment: Optional[str] = None, task: Optional[str] = None) -> None:
    """Cancel the tasks of an experiment that have not ended, and wait until they have.

    A training saves its state first where the scheduler leaves it the time. Raises ConfigError when none is named or it
    runs in the foreground of this machine, LaunchError when a task does not end.

    Args:
        experiment: Id or name of an experiment; it must be named.
        task: One of several tasks.
    """
    if experiment is None:
        raise ConfigError(f"cancel needs the id of an experiment; {suggest('', list(_known())[:SHOWN])}")
    found = find(experiment)
    before = {state.task for state in states(found, task) if not state.is_over}
    for job in _jobs(found, task):
        if isinstance(job.executor, run.LocalExecutor) and job.id in before:
            raise ConfigError(f"{found._id} runs in the foreground of this machine; Ctrl-C stops it where it does.")
        _stop(found, job)
    end = time.monotonic() + CANCEL_SECONDS
    while running := [state for state in states(found, task) if not state.is_over]:
        if time.monotonic() > end:
            raise LaunchError(f"{running[0]} was cancelled {CANCEL_SECONDS:.0f} s ago and has not ended.")
        time.sleep(POLL_SECONDS)
    for state in states(found, task):
        print(f"{found._id}  {state}" if state.task in before else f"{found._id}  {state.task} had ended before.")


def find(experiment: Optional[str] = None) -> run.Experiment:
    """Return the experiment with an id, the newest one with a name, or the newest of all.

    Raises ConfigError when there is none, naming those there are.
    """
    known = _known()
    if experiment is None and not known:
        raise ConfigError("nothing was launched yet: there is no experiment to look at.")
    identity = next((one for one in known if experiment in (None, one, _name(one))), None)
    if identity is None:
        raise ConfigError(f"no experiment is called {quoted(experiment)}; {suggest(experiment or '', _newest(known))}")
    try:
        with _home(known[identity]):
            found = run.Experiment.from_id(identity)
            found._initialize_tunnels(extract_from_executors=True)
    except _UNREADABLE as error:
        reason = quoted(" ".join(str(error).split()), 200, bare=True)
        raise LaunchError(f"experiment {identity!r} cannot be looked at: {reason}") from error
    return found


def states(experiment: run.Experiment, task: Optional[str] = None) -> list[State]:
    """Return how the tasks of an experiment are; raises LaunchError when their scheduler does not answer."""
    return [state for job in _jobs(experiment, task) for state in _states(experiment, job)]


def lines(experiment: run.Experiment, task: Optional[str] = None, follow: bool = False) -> Iterator[str]:
    """Yield the lines of the tasks' logs, marked with the task where there are several.

    ``follow`` waits for more until the tasks have ended. Raises LaunchError when nobody knows how they are.
    """
    jobs = _jobs(experiment, task)
    readers = {job.id: log_of(job, experiment) for job in jobs}
    unknown = 0
    while True:
        now = states(experiment, task)
        over = all(state.is_over for state in now)
        yield from _new_lines(readers, over)
        unknown = unknown + 1 if any(state.state == "UNKNOWN" for state in now) else 0
        if over or not follow:
            return
        if unknown > _MOST_UNKNOWN:
            raise LaunchError(f"nobody knows how {experiment._id} is; look with its scheduler's own commands.")
        time.sleep(POLL_SECONDS)


def _new_lines(readers: dict[str, JobLog], over: bool) -> Iterator[str]:
    for name, reader in readers.items():
        for line in reader.more(over):
            yield f"{name}: {line}" if len(readers) > 1 else line


def _states(experiment: run.Experiment, job: Job) -> list[State]:
    directory, number = Path(job.executor.job_dir), _number(job)
    if isinstance(job.executor, run.SlurmExecutor) and number:
        return [
            State(_element(job.id, one.job), one.state, one.words, one.job, directory, one.is_over, one.succeeded)
            for one in accounts(_tunnel(experiment, job), number)
        ]
    state = job.status(experiment._runner)
    return [State(job.id, state.name, "", number, directory, is_terminal(state), state == AppState.SUCCEEDED)]


def _number(job: Job) -> str:
    """Return the scheduler's id of a job, '' before it is submitted."""
    number: str = job.handle.rpartition("://")[2].rpartition("/")[2]
    return number


def _stop(experiment: run.Experiment, job: Job) -> None:
    if isinstance(job.executor, run.SlurmExecutor):
        # NeMo Run cancels nothing that sacct has not heard of yet
        ask(_tunnel(experiment, job), f"scancel {shlex.quote(_number(job))}")
    else:
        job.cancel(experiment._runner)


def _has_ranks(experiment: run.Experiment) -> bool:
    return any(isinstance(job.executor.get_launcher(), Torchrun | FaultTolerance) for job in experiment.jobs)


def _as_launched(line: str, ranks: bool) -> str:
    """Return what a launch would show of a line of the log, '' for nothing."""
    rank = RANK_PREFIX.match(line)
    if ranks and (rank is None or rank[1] != "0"):
        return ""
    line = line[rank.end() :] if rank else line
    return "" if USER_ERROR.match(line) else line


def _element(task: str, job: str) -> str:
    return f"{task}[{job.partition('_')[2]}]" if "_" in job else task


def _tunnel(experiment: run.Experiment, job: Job) -> Tunnel:
    own = job.executor.tunnel
    return experiment.tunnels.get(own.key, own)


def _jobs(experiment: run.Experiment, task: Optional[str]) -> list[Job]:
    jobs = experiment.jobs
    if task is None:
        return list(jobs)
    if chosen := [job for job in jobs if job.id == task]:
        return chosen
    raise ConfigError(f"{experiment._id} has no task {quoted(task)}; {suggest(task, [job.id for job in jobs])}")


def _known() -> dict[str, Path]:
    """Return the home of every experiment by its id, the newest first."""
    homes = [Path(get_nemorun_home())]
    profile = find_profile()
    if profile is not None and profile.job_dir and profile.ssh is None:
        homes.append(Path(profile.job_dir).expanduser())
    found = {place.parent.name: home for home in homes for place in home.glob("experiments/*/*/_TASKS")}
    return dict(sorted(found.items(), key=lambda item: _started(item[0]), reverse=True))


def _newest(known: dict[str, Path]) -> list[str]:
    return list(known)[:SHOWN]


def _started(identity: str) -> int:
    number = identity.rpartition("_")[2]
    return int(number) if number.isdigit() else 0


def _name(identity: str) -> str:
    return identity.rpartition("_")[0]


@contextmanager
def _looking_at(identity: str) -> Iterator[None]:
    """Say, when this process is asked to stop, that only looking stops."""
    try:
        yield
    except Interrupted as asked:
        sentence = f"stopped looking at {identity}, which goes on; 'nemorun graft attach {identity}' looks again"
        raise Interrupted(sentence, INTERRUPTED_EXIT_CODE) from asked


@contextmanager
def _home(place: Path) -> Iterator[None]:
    before = get_nemorun_home()
    set_nemorun_home(str(place))
    try:
        yield
    finally:
        set_nemorun_home(before)
