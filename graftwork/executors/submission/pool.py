"""Several tasks of one experiment, so many at a time: NeMo Run starts all of them at once, or waits level by level."""

import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import nemo_run as run
from nemo_run.run.job import Job

from graftwork.executors.following.relay import Relay
from graftwork.executors.process.task import LAUNCHER
from graftwork.executors.submission.containers import life_lines, prepare_container
from graftwork.executors.submission.experiment import Experiment

Told = Callable[[str, str, str], None]
"""Hears of a task by its name: its state, ``RUNNING`` or how it ended, and the directory with its logs."""


class Pool(Experiment):
    """An experiment that runs ``parallel`` tasks at a time and starts no more of them once it is to stop.

    ``told`` hears when a task starts and how it ends; a task that fails stops no other.
    """

    parallel = 1
    told: Told = staticmethod(lambda name, state, directory: None)
    relay: Relay | None = None

    def _run_dag(self, detach: bool, tail_logs: bool, executors: set[run.Executor]) -> None:
        context = contextvars.copy_context()  # NeMo Run keeps the experiment of a thread in it
        with ThreadPoolExecutor(self.parallel, initializer=_enter, initargs=(context,)) as threads:
            for ended in [threads.submit(self._run_one, job) for job in self.jobs]:
                ended.result()
        self._save_jobs()
        self._launched = self._waited = True

    def _run_one(self, job: Job) -> None:
        if self.relay is not None and self.relay.stopped_by is not None:
            return
        self.told(job.id, "RUNNING", job.executor.job_dir)
        job.launch(wait=False, runner=self._runner)
        job.wait(runner=self._runner)
        job.cleanup()
        self.told(job.id, job.state.name, job.executor.job_dir)


def add(experiment: Pool, task: run.Partial, executor: run.Executor, name: str) -> None:
    """Add one task; a local one does not outlive this process."""
    prepare_container(executor)
    if isinstance(executor, run.LocalExecutor):
        executor.env_vars[LAUNCHER] = str(os.getpid())
    experiment.add(task, executor=executor, name=name)


def start(experiment: Pool) -> None:
    """Run all tasks to their end; raises LaunchError when one cannot be started."""
    with life_lines(experiment.jobs):
        experiment.start()


def _enter(context: contextvars.Context) -> None:
    for variable, value in context.items():
        variable.set(value)
