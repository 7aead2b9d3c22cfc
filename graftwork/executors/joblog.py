"""What a job has written so far, read bit by bit: from this machine's files, or over the tunnel that submitted it."""

import shlex
from pathlib import Path
from typing import Protocol

import nemo_run as run
from nemo_run.core.tunnel.client import Tunnel
from nemo_run.run.job import Job

from graftwork.executors.outcome import log_lines


class JobLog(Protocol):
    """The log of one task."""

    def more(self) -> list[str]:
        """Return the lines that have been added since the last call."""
        ...


class FileLog:
    """The log of a task whose files are on this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._read = directory, 0

    def more(self) -> list[str]:
        """Return the lines that have been added since the last call."""
        lines = log_lines(self.directory)[self._read :]
        self._read += len(lines)
        return lines


class ClusterLog:
    """The log of a Slurm job: the files of all its attempts and elements, the oldest first.

    What the batch script itself has written is shown only where the job has written nothing.
    """

    def __init__(self, tunnel: Tunnel, directory: str) -> None:
        self.tunnel, self.directory = tunnel, directory
        self._read: dict[str, int] = {}

    def more(self) -> list[str]:
        """Return the lines that have been added since the last call."""
        return [line for file in self._files() for line in self._more_of(file)]

    def _files(self) -> list[str]:
        place = shlex.quote(self.directory)
        return self._run(f"ls -1tr {place}/log-*.out 2>/dev/null || ls -1tr {place}/sbatch_*.out 2>/dev/null")

    def _more_of(self, file: str) -> list[str]:
        begun = self._read.get(file, 0)
        # `head -n -0` would keep a line that is still being written
        text = self._run(f"tail -n +{begun + 1} {shlex.quote(file)}", whole=True)
        self._read[file] = begun + len(text)
        return text

    def _run(self, command: str, whole: bool = False) -> list[str]:
        text: str = self.tunnel.run(command, hide=True, warn=True, in_stream=False).stdout
        lines = text.split("\n")
        return lines[:-1] if whole else [line for line in lines if line]


def log_of(job: Job, experiment: run.Experiment) -> JobLog:
    """Return the log of a task of an experiment."""
    executor = job.executor
    if not isinstance(executor, run.SlurmExecutor):
        return FileLog(Path(executor.job_dir))
    tunnel = experiment.tunnels.get(executor.tunnel.key, executor.tunnel)
    return ClusterLog(tunnel, f"{executor.tunnel.job_dir}/{Path(executor.job_dir).name}")
