"""A Slurm job array: one submission of many recipes, followed with sacct.

NeMo Run submits an array, but cannot follow it: it looks for the array's own id among the accounts of its elements,
finds none, and calls the job UNKNOWN for ever.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import nemo_run as run

from graftwork.errors import ConfigError
from graftwork.executors.following.accounting import Account, accounts
from graftwork.executors.process.task import perform
from graftwork.executors.submission.experiment import Experiment
from graftwork.executors.submission.pool import Told

ELEMENT = "SLURM_ARRAY_TASK_ID"
POLL_SECONDS = 5.0

_SAME = ("nodes", "ntasks_per_node", "gpus_per_node")


def perform_one(recipes: list[str], shown: list[str]) -> None:
    """Run the one of the serialised recipes that this element of the array is; ``shown`` names them."""
    perform(recipes[int(os.environ[ELEMENT])], shown)


class Array:
    """Tasks as one job array; ``job`` is its id once it is submitted."""

    def __init__(
        self,
        tasks: Sequence[run.Partial],
        executors: Sequence[run.SlurmExecutor],
        name: str,
        parallel: Optional[int] = None,
    ) -> None:
        """Raises ConfigError when the tasks ask for different nodes or devices: an array has one size."""
        for size in _SAME:
            if len(found := {getattr(executor, size) for executor in executors}) > 1:
                raise ConfigError(
                    f"runs of a Slurm sweep are one job array, but they ask for different {size}: "
                    f"{', '.join(map(str, sorted(found, key=str)))}; submit them as sweeps of their own."
                )
        self.name, self.job = name, ""
        self.executor = executors[0].clone()
        self.executor.array = f"0-{len(tasks) - 1}" + (f"%{parallel}" if parallel else "")
        self.task = run.Partial(
            perform_one, recipes=[task.recipe for task in tasks], shown=[line for task in tasks for line in task.shown]
        )
        self.experiment = Experiment.quiet(name, self.executor)
        self.experiment.reckon_with(self.task.recipes)

    def submit(self) -> None:
        """Submit the array; raises LaunchError when Slurm does not take it."""
        self.experiment.add(self.task, executor=self.executor, name=self.name)
        self.experiment.start(detach=True)
        self.job = self.experiment.jobs[0].handle.rpartition("://")[2].split("/")[1]

    def follow(self, names: Sequence[str], told: Told) -> None:
        """Tell how the elements, called ``names``, go on until the last has ended; raises LaunchError without Slurm."""
        known = [""] * len(names)
        over = 0
        while over < len(names):
            found = self.accounts()
            for number, account in found.items():
                word = _word(account)
                if word and known[number] != word:
                    known[number] = word
                    told(names[number], word, str(self.logs(number)))
            over = sum(account.is_over for account in found.values())
            time.sleep(POLL_SECONDS)

    def accounts(self) -> dict[int, Account]:
        """Return what Slurm knows of every element, by its number."""
        found = accounts(self.experiment.jobs[0].executor.tunnel, self.job)
        return {int(number): one for one in found for number in [one.job.partition("_")[2]] if number.isdigit()}

    def logs(self, number: int) -> Path:
        """Return a directory with links to the logs of one element: those of the others do not explain its end."""
        home = Path(self.experiment.jobs[0].executor.job_dir)
        own = home / f"element-{number}"
        own.mkdir(parents=True, exist_ok=True)
        # the script's log has the array's id and the number, those of its steps the id that the element got for itself
        for pattern in (f"sbatch_*_{self.job}_{number}.out", f"log*_{self._own_id(number)}_*.out"):
            for log in home.glob(pattern):
                if not (own / log.name).exists():
                    (own / log.name).symlink_to(log)
        return own

    def _own_id(self, number: int) -> str:
        tunnel = self.experiment.jobs[0].executor.tunnel
        command = f"sacct -j {self.job}_{number} -X -n -P -o JobIDRaw"
        found: str = tunnel.run(command, hide=True, warn=True).stdout.strip()
        return found if found.isdigit() else "unknown"


def _word(account: Account) -> str:
    """Return how an element is in NeMo Run's words, "" while it waits."""
    if account.is_over:
        words = ", ".join(part for part in (account.state, account.words) if part)
        return "SUCCEEDED" if account.succeeded else words
    return "RUNNING" if account.state == "RUNNING" else ""
