"""One launch of a recipe: an experiment with one task, started, waited for and asked how it ended."""

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack

import nemo_run as run
from nemo_run.core.execution.launcher import FaultTolerance, Torchrun

from graftwork.errors import ConfigError
from graftwork.executors.following.accounting import status_of
from graftwork.executors.following.outcome import check
from graftwork.executors.following.relay import Relay
from graftwork.executors.process.task import LAUNCHER, as_task
from graftwork.executors.submission.containers import life_lines, prepare_container
from graftwork.executors.submission.experiment import Experiment


class Job:
    """One launch of a recipe; ``identity`` is the experiment's id."""

    def __init__(
        self, recipe: run.Partial, executor: run.Executor, name: str, *, wait: bool, tail: bool,
        plugins: Sequence[run.Plugin],
    ) -> None:  # fmt: skip
        self.executor, self.name, self.wait, self.tail = executor.clone(), name, wait, tail
        prepare_container(self.executor)
        self.has_ranks = isinstance(self.executor.get_launcher(), Torchrun | FaultTolerance)
        self.experiment = Experiment.quiet(name, self.executor)
        self.identity: str = self.experiment._id
        self.task = as_task(self._changed(recipe, plugins))
        self.experiment.reckon_with([self.task.recipe])
        if isinstance(self.executor, run.LocalExecutor):
            self.executor.env_vars[LAUNCHER] = str(os.getpid())

    def go_through(self, relay: Relay) -> None:
        """Start the task, wait for it, and raise what it ended with."""
        with ExitStack() as held, self.experiment as experiment:
            experiment.add(self.task, executor=self.executor, name=self.name, tail_logs=self.tail)
            held.enter_context(life_lines(experiment.jobs))
            experiment.start(detach=not self.wait, tail_logs=self.tail)
            relay.attach(experiment)
        check(status_of(experiment), detached=not self.wait)

    def _changed(self, recipe: run.Partial, plugins: Sequence[run.Plugin]) -> run.Partial:
        """Return the recipe as plugins change it; they change the executor too."""
        changed = recipe.clone() if plugins else recipe
        for plugin in plugins:
            plugin.assign(self.identity)
            plugin.setup(changed, self.executor)
        return changed


def task_name(name: str) -> str:
    """Return ``name`` as schedulers accept it; raises ConfigError when nothing usable is left."""
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    if not cleaned:
        raise ConfigError(f"{name!r} is no name for a run; use letters, digits, '-' and '_'.")
    return cleaned
