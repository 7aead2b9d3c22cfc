"""Many recipes as one NeMo Run experiment: what is finished is skipped, what was interrupted goes on."""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import nemo_run as run

from graftwork import errors
from graftwork.endings import Interrupted, code_of
from graftwork.errors import CheckpointError, ConfigError, GraftworkError, LaunchError, quoted
from graftwork.executors.following.live import live_log
from graftwork.executors.following.outcome import failure
from graftwork.executors.following.relay import Relay, relayed
from graftwork.executors.local import built
from graftwork.executors.placing.placement import placed
from graftwork.executors.placing.refusals import make_folders, refuse_unready
from graftwork.executors.process.here import check_values
from graftwork.executors.process.task import as_task, sentence
from graftwork.executors.submission import array, pool
from graftwork.executors.submission.job import task_name
from graftwork.jsonfile import read_object
from graftwork.recipes.show import show

GOES_ON = "stopped; the same command goes on with what is left"


@dataclass(frozen=True)
class Member:
    """One run of a sweep, as it is launched; ``place``: (its number, how many there are)."""

    recipe: run.Partial
    executor: run.Executor
    place: tuple[int, int]

    @property
    def directory(self) -> Path:
        """Where it writes."""
        return Path(self.recipe.trainer.default_root_dir)

    @property
    def task(self) -> str:
        """Its name in the experiment."""
        return f"{self.place[0]}-{task_name(self.directory.name)}"

    @property
    def summary(self) -> dict[str, object]:
        """What ``summary.json`` says, {} without one."""
        try:
            return read_object(self.directory / "summary.json", CheckpointError)
        except CheckpointError:
            return {}

    @property
    def is_finished(self) -> bool:
        """Whether this very recipe has run to its end; a recipe with ``resume=False`` starts anew."""
        digest = hashlib.sha256(show(self.recipe).encode()).hexdigest()
        return getattr(self.recipe, "resume", True) and self.summary.get("recipe_sha256") == digest

    def say(self, sentence: str) -> None:
        """Print a line about the run."""
        number, count = self.place
        print(f"[{number}/{count}] {self.directory.name}: {sentence}", flush=True)


class Progress:
    """The runs of one experiment; ``ended`` holds how those ended that did not succeed."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = {member.task: member for member in members}
        self.ended: dict[str, GraftworkError | Interrupted] = {}
        self._started: dict[str, float] = {}

    def hear(self, task: str, state: str, directory: str) -> None:
        """Tell the user of a task that has started or ended."""
        member = self.members[task]
        if state == "RUNNING":
            self._started[task] = time.monotonic()
            member.say("started")
        elif state == "SUCCEEDED":
            member.say(f"finished, {_result(member)}{self._time(task)}")
        else:
            self.ended[task] = failure(member.directory.name, state, Path(directory))
            member.say(_first_line(self.ended[task]))

    def _time(self, task: str) -> str:
        since = self._started.get(task)
        return f", {time.monotonic() - since:.0f} s" if since is not None else ""

    def refuse_failures(self) -> None:
        """Raise LaunchError when runs failed."""
        failed = [self.members[task].directory.name for task in self.ended]
        if failed:
            names = ", ".join(failed[:6]) + (", ..." if len(failed) > 6 else "")
            raise LaunchError(
                f"{len(failed)} of {len(self.members)} runs failed: {names}; the same command runs them again."
            )


def sweep(
    recipes: Sequence[run.Partial],
    executor: run.Executor | run.Config | None = None,
    name: str = "sweep",
    parallel: Optional[int] = None,
    wait: bool = True,
) -> str:
    """Run every recipe as a task of one experiment and return the experiment's id.

    ``recipes``: as ``recipes.grid`` makes them, each with a run directory of its own. ``parallel``: so many at a time;
    None: one after another, and on Slurm, where they are one job array, as many as the queue lets run.

    A run whose directory holds the result of this very recipe is skipped, one that was interrupted goes on; '' is
    returned when nothing is left to do. A run that fails stops no other. ``wait=False`` returns once a Slurm array is
    submitted. Raises ConfigError, ParallelismError before anything starts, LaunchError at the end when runs have
    failed, and Interrupted, the states saved, when the sweep is asked to stop.
    """
    if parallel is not None and parallel < 1:
        raise ConfigError(f"parallel={parallel}: at least 1 run at a time is valid.")
    target = built(executor)
    refuse_unready(target)
    left = [member for member in _members(recipes, target) if not _skipped(member)]
    if not left:
        return ""
    for member in left:
        make_folders(member.executor)
    members = Progress(left)
    if isinstance(target, run.SlurmExecutor):
        identity = _as_array(members, task_name(name), parallel, wait)
    else:
        identity = _as_pool(members, task_name(name), parallel or 1)
    members.refuse_failures()
    return identity


def _members(recipes: Sequence[run.Partial], executor: run.Executor) -> list[Member]:
    """Number the runs; raises ConfigError for none, for two in one directory and for values that cannot be."""
    if not recipes:
        raise ConfigError("a sweep needs at least one recipe.")
    fitting = [placed(recipe, executor) for recipe in recipes]
    members = [Member(*pair, (number, len(recipes))) for number, pair in enumerate(fitting, 1)]
    seen: dict[Path, Member] = {}
    for member in members:
        if (other := seen.setdefault(member.directory.resolve(), member)) is not member:
            raise ConfigError(
                f"runs {other.place[0]} and {member.place[0]} of the sweep have one directory, "
                f"{quoted(member.directory)}; set trainer.default_root_dir, as recipes.grid does."
            )
        _check(member)
    return members


def _check(member: Member) -> None:
    try:
        check_values(member.recipe)
    except GraftworkError as error:
        # Fiddle's own class of the same name cannot be made again
        kind = next(one for one in type(error).__mro__ if getattr(errors, one.__name__, None) is one)
        raise kind(f"run {member.directory.name!r}: {sentence(error)}") from error


def _skipped(member: Member) -> bool:
    if member.is_finished:
        member.say(f"finished before, {_result(member)}")
    return member.is_finished


def _as_pool(runs: Progress, name: str, parallel: int) -> str:
    members = list(runs.members.values())
    tasks = [as_task(member.recipe) for member in members]
    experiment = pool.Pool.quiet(name, members[0].executor)
    experiment.parallel, experiment.told = parallel, runs.hear
    experiment.reckon_with(task.recipe for task in tasks)

    def go_through(relay: Relay) -> None:
        experiment.relay = relay
        with experiment:
            for member, task in zip(members, tasks):
                pool.add(experiment, task, member.executor, member.task)
            relay.attach(experiment)
            pool.start(experiment)

    _relayed(name, go_through)
    identity: str = experiment._id
    return identity


def _as_array(runs: Progress, name: str, parallel: Optional[int], wait: bool) -> str:
    members = list(runs.members.values())
    tasks = [as_task(member.recipe) for member in members]
    submitted = array.Array(tasks, [member.executor for member in members], name, parallel)
    identity: str = submitted.experiment._id

    def go_through(relay: Relay) -> None:
        with submitted.experiment as experiment:
            submitted.submit()
            relay.attach(experiment)
        print(f"{len(members)} runs are job array {submitted.job} of experiment {identity}", flush=True)
        if wait:
            submitted.follow(list(runs.members), runs.hear)

    _relayed(name, go_through)
    return identity


def _relayed(name: str, go_through: Callable[[Relay], None]) -> None:
    """Call in another thread while this one passes signals on; raises what it raises, and Interrupted once stopped."""
    with live_log(name, ranks=False) as log, ThreadPoolExecutor(1) as thread:
        relay = Relay(log)
        with relayed(relay):
            # NeMo Run's local scheduler takes SIGTERM and Ctrl-C for itself when it is made in the main thread.
            ended = thread.submit(go_through, relay).exception()
    if relay.stopped_by is not None:
        stopped = Interrupted(GOES_ON, code_of(relay.stopped_by, saved=True))
        stopped.tell()
        raise stopped
    if ended is not None:
        raise ended


def _result(member: Member) -> str:
    """Return the loss of a finished run in words."""
    found = {name: value for name, value in member.summary.items() if name in ("val_loss", "train_loss")}
    told = [f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float)]
    return told[-1] if told else "without a loss"


def _first_line(error: GraftworkError | Interrupted) -> str:
    return str(error).splitlines()[0]
