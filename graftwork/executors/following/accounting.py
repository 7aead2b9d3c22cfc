"""What Slurm tells of a job: the state of each of its elements, why it waits, how it ended."""

import re
import shlex
import subprocess
from dataclasses import dataclass

import nemo_run as run
from nemo_run.core.tunnel.client import Tunnel

from graftwork.errors import LaunchError, quoted
from graftwork.executors.following.outcome import TaskState

_WAITS = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "STOPPED"})
_RUNS = frozenset({"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING"})
_QUEUED = "queued|"
"""What begins a line of squeue; it knows a job before sacct does, sacct one that squeue has forgotten."""


@dataclass(frozen=True)
class Account:
    """One job, or one element of an array: its id, Slurm's word for its state, and what more there is to tell."""

    job: str
    state: str
    words: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or badly."""
        return self.state not in _WAITS | _RUNS

    @property
    def succeeded(self) -> bool:
        """Whether it has ended well."""
        return self.state == "COMPLETED"


def accounts(tunnel: Tunnel, job: str) -> list[Account]:
    """Return what is known of ``job``, or of every element of it; raises LaunchError when Slurm does not answer."""
    number = shlex.quote(job)
    answer = ask(
        tunnel,
        f"squeue -h -r -j {number} -o '{_QUEUED}%i|%T|%r|%M of %l|%N' 2>/dev/null; "
        f"sacct -j {number} -X -n -P -o JobID,State,ExitCode,Elapsed,NodeList",
    )
    lines = answer.stdout.splitlines()
    found = {one.job: one for one in map(_ended, lines) if one} | {one.job: one for one in map(_queued, lines) if one}
    if not found and answer.returncode:
        raise LaunchError(f"Slurm tells nothing of job {job}: {quoted(answer.stderr.strip(), 200, bare=True)}")
    return [found[name] for name in sorted(found, key=_by_number)] or [Account(job, "PENDING")]


def ask(tunnel: Tunnel, command: str) -> subprocess.CompletedProcess[str]:
    """Return what a shell command answers on the machine that submits; NeMo Run's own way leaves pipes open."""
    if isinstance(tunnel, run.LocalTunnel):
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    told = tunnel.run(command, hide=True, warn=True, in_stream=False)
    return subprocess.CompletedProcess(command, told.return_code, told.stdout, told.stderr)


def status_of(experiment: run.Experiment) -> dict[str, TaskState]:
    """Return NeMo Run's status of an experiment, with Slurm's own word for what did not succeed there."""
    status: dict[str, TaskState] = experiment.status(return_dict=True)
    for job in experiment.jobs:
        executor, number = job.executor, job.handle.rpartition("://")[2].split("/")[-1]
        badly = getattr(status[job.id]["status"], "name", "") == "FAILED"
        if isinstance(executor, run.SlurmExecutor) and badly and number:
            one = accounts(experiment.tunnels.get(executor.tunnel.key, executor.tunnel), number)[0]
            status[job.id]["words"] = one.state if one.is_over else "FAILED"
    return status


def _queued(line: str) -> Account | None:
    if not line.startswith(_QUEUED):
        return None
    job, state, reason, time, nodes = line.removeprefix(_QUEUED).split("|")
    return Account(job, state, reason if state == "PENDING" else f"{time} on {nodes}")


def _ended(line: str) -> Account | None:
    if line.startswith(_QUEUED) or line.count("|") != 4:
        return None
    job, state, code, elapsed, nodes = line.split("|")
    word, _, rest = state.partition(" ")  # CANCELLED by 1000
    status, _, signal = code.partition(":")
    told = f"exit code {status}" if status != "0" else f"signal {signal}" if signal != "0" else ""
    where = f"after {elapsed} on {nodes}" if nodes != "None assigned" else ""
    return Account(job, word, ", ".join(part for part in (rest, told, where) if part))


def _by_number(job: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", job)]
