"""What a job has written so far, read bit by bit: from this machine's files, or over the tunnel that submitted it."""

import shlex
from pathlib import Path
from typing import Protocol

import nemo_run as run
from nemo_run.core.tunnel.client import Tunnel
from nemo_run.run.job import Job

from graftwork.executors.following.accounting import ask
from graftwork.executors.following.outcome import log_lines


class JobLog(Protocol):
    """The log of one task."""

    def more(self, over: bool) -> list[str]:
        """Return the lines that have been added since the last call; ``over``: no more will come."""
        ...


class FileLog:
    """The log of a task whose files are on this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._read = directory, 0

    def more(self, over: bool) -> list[str]:
        """Return the lines that have been added since the last call; ``over``: no more will come."""
        lines = log_lines(self.directory)[self._read :]
        self._read += len(lines)
        return lines


class ClusterLog:
    """The log of a Slurm job: the files of all its attempts and elements, the oldest first.

    What the batch script itself has written is shown only where the job has ended and written nothing.
    """

    def __init__(self, tunnel: Tunnel, directory: str) -> None:
        self.tunnel, self.directory = tunnel, directory
        self._read: dict[str, int] = {}

    def more(self, over: bool) -> list[str]:
        """Return the lines that have been added since the last call; ``over``: no more will come."""
        return [line for file in self._files(over) for line in self._more_of(file, over)]

    def _files(self, over: bool) -> list[str]:
        place = shlex.quote(self.directory)
        own = self._names(f"{place}/log-*.out")
        return own if own or not over else self._names(f"{place}/sbatch_*.out")

    def _names(self, pattern: str) -> list[str]:
        return ask(self.tunnel, f"ls -1tr {pattern} 2>/dev/null").stdout.splitlines()

    def _more_of(self, file: str, over: bool) -> list[str]:
        begun = self._read.get(file, 0)
        lines = ask(self.tunnel, f"tail -n +{begun + 1} {shlex.quote(file)}").stdout.split("\n")
        if not over or not lines[-1]:
            del lines[-1]  # it is still being written
        self._read[file] = begun + len(lines)
        return lines


def log_of(job: Job, experiment: run.Experiment) -> JobLog:
    """Return the log of a task of an experiment."""
    executor = job.executor
    if not isinstance(executor, run.SlurmExecutor):
        return FileLog(Path(executor.job_dir))
    tunnel = experiment.tunnels.get(executor.tunnel.key, executor.tunnel)
    return ClusterLog(tunnel, f"{executor.tunnel.job_dir}/{Path(executor.job_dir).name}")
