"""NeMo Run's experiment as it is used here: it prints nothing itself and says in one sentence why it cannot start."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import nemo_run as run

from graftwork.errors import LaunchError
from graftwork.executors.placing.refusals import explain_submission
from graftwork.executors.slurm import base_directory
from graftwork.executors.submission.main_script import needs_script

_RANK_VARIABLE = re.compile(r"((LOCAL|NODE|GROUP|ROLE)_)?RANK$|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE$|MASTER_|TORCHELASTIC_")


class Experiment(run.Experiment):
    """An experiment that takes the launching script along only where a task names something that it defines."""

    takes_script = False

    @classmethod
    def quiet(cls, name: str, executor: run.Executor) -> Self:
        """Return an experiment without tasks, in the place where jobs on ``executor`` are."""
        return cls(
            name,
            executor=executor,
            base_dir=base_directory(executor),
            log_level="WARNING",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
        )

    def reckon_with(self, recipes: Iterable[str]) -> None:
        """Look at what tasks will perform, as JSON, for what the launching script defines; called where it launches.

        Raises ConfigError where a task could not find it.
        """
        self.takes_script |= any(map(needs_script, recipes))

    def start(self, detach: bool = False, tail_logs: bool = False) -> None:
        """Start the tasks and, unless ``detach``, wait for them; raises LaunchError when they cannot be started."""
        try:
            with without_ranks():
                self.run(detach=detach, tail_logs=tail_logs)
        except Exception as error:
            reason = explain_submission(error)
            if not reason and not isinstance(error, OSError):
                raise
            shutil.rmtree(self._exp_dir, ignore_errors=True)
            where = self.executor.info()
            raise LaunchError(f"could not start {self._title!r} on {where}: {reason or error}") from error

    def _save_experiment(self, exist_ok: bool = False) -> None:
        super()._save_experiment(exist_ok=True)  # a container's life line is there already

    def _save_jobs(self) -> None:
        super()._save_jobs()
        if not self.takes_script:
            Path(self._exp_dir, "__main__.py").unlink(missing_ok=True)


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
