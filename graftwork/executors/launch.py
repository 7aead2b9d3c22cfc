"""Launch a recipe and check how it ended: NeMo Run itself reports success whatever the task did."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import fiddle as fdl
import nemo_run as run
from nemo_run.core.execution.launcher import FaultTolerance, Torchrun

from graftwork.endings import Interrupted
from graftwork.errors import ConfigError, LaunchError
from graftwork.executors.accounting import status_of
from graftwork.executors.containers import find_image, life_lines, prepare_container
from graftwork.executors.live import live_log
from graftwork.executors.local import local
from graftwork.executors.main_script import Experiment, needs_script
from graftwork.executors.outcome import check
from graftwork.executors.placement import placed
from graftwork.executors.refusals import explain_submission, make_folders, refuse_unready
from graftwork.executors.relay import Relay, relayed
from graftwork.executors.slurm import base_directory
from graftwork.executors.task import LAUNCHER, as_task

_RANK_VARIABLE = re.compile(r"((LOCAL|NODE|GROUP|ROLE)_)?RANK$|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE$|MASTER_|TORCHELASTIC_")


def launch(
    recipe: run.Partial,
    executor: run.Executor | run.Config | None = None,
    name: str = "graftwork",
    wait: bool = True,
    tail: bool = True,
    plugins: list[run.Plugin] | None = None,
) -> str:
    """Run ``recipe`` on ``executor`` (default: this machine) as one fresh experiment and return the experiment's id.

    ``wait=False`` detaches where the executor can (this machine cannot); ``tail`` shows what rank 0 prints. A task that
    fails raises the GraftworkError it ended with, or LaunchError with the end of its log. SIGTERM, SIGUSR1 and Ctrl-C
    reach every rank; the state is saved and Interrupted is raised. A second Ctrl-C kills the task.
    """
    recipe, placed_on = placed(recipe, _built(executor))
    refuse_unready(placed_on)
    find_image(placed_on)
    make_folders(placed_on)
    job = Job(recipe, placed_on, task_name(name), wait=wait, tail=tail, plugins=plugins or ())
    with live_log(job.name, job.has_ranks) as log, ThreadPoolExecutor(1) as thread:
        relay = Relay(log)
        with relayed(relay):
            # NeMo Run's local scheduler takes SIGTERM and Ctrl-C for itself when it is made in the main thread.
            ended = thread.submit(job.go_through, relay).exception()
    if ended := relay.ending(ended):
        if isinstance(ended, Interrupted):
            ended.tell()
        raise ended
    return job.identity


class Job:
    """One launch of a recipe; ``identity`` is the experiment's id."""

    def __init__(
        self, recipe: run.Partial, executor: run.Executor, name: str, *, wait: bool, tail: bool,
        plugins: Sequence[run.Plugin],
    ) -> None:  # fmt: skip
        self.executor, self.name, self.wait, self.tail = executor.clone(), name, wait, tail
        prepare_container(self.executor)
        self.has_ranks = isinstance(self.executor.get_launcher(), Torchrun | FaultTolerance)
        self.experiment = Experiment(
            name,
            executor=self.executor,
            base_dir=base_directory(self.executor),
            log_level="WARNING",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
        )
        self.identity: str = self.experiment._id
        self.task = as_task(self._changed(recipe, plugins))
        self.experiment.takes_script = needs_script(self.task.recipe)
        if isinstance(self.executor, run.LocalExecutor):
            self.executor.env_vars[LAUNCHER] = str(os.getpid())

    def go_through(self, relay: Relay) -> None:
        """Start the task, wait for it, and raise what it ended with."""
        with ExitStack() as held, self.experiment as experiment:
            experiment.add(self.task, executor=self.executor, name=self.name, tail_logs=self.tail)
            held.enter_context(life_lines(experiment.jobs))
            self._start()
            relay.attach(experiment)
        check(status_of(experiment), detached=not self.wait)

    def _start(self) -> None:
        try:
            with without_ranks():
                self.experiment.run(detach=not self.wait, tail_logs=self.tail)
        except Exception as error:
            reason = explain_submission(error)
            if not reason and not isinstance(error, OSError):
                raise
            shutil.rmtree(self.experiment._exp_dir, ignore_errors=True)
            where = self.executor.info()
            raise LaunchError(f"could not start {self.name!r} on {where}: {reason or error}") from error

    def _changed(self, recipe: run.Partial, plugins: Sequence[run.Plugin]) -> run.Partial:
        """Return the recipe as plugins change it; they change the executor too."""
        changed = recipe.clone() if plugins else recipe
        for plugin in plugins:
            plugin.assign(self.experiment._id)
            plugin.setup(changed, self.executor)
        return changed


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
