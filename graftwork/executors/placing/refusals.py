"""Why a job cannot be submitted, in one sentence: what can be known before, and what schedulers say."""

import re
import shutil
from pathlib import Path

import nemo_run as run

from graftwork.errors import LaunchError, quoted

_SBATCH = re.compile(r"^sbatch: error: (?!Batch job submission failed:)(.+)$", re.MULTILINE)
_SBATCH_END = re.compile(r"^sbatch: error: Batch job submission failed: (.+)$", re.MULTILINE)
_DOCKER_API = re.compile(r"(?:Client|Server) Error[^(]*\(\"(.+?)\"\)", re.DOTALL)
_DOCKER_DOWN = ("Error while fetching server API version", "Connection aborted", "Cannot connect to the Docker daemon")

ADVICE = {
    "invalid partition": "'sinfo -s' lists the partitions",
    "invalid account": "'sacctmgr show associations user=$USER' lists the accounts",
    "invalid qos": "'sacctmgr show qos' lists them",
    "invalid generic resource": "this cluster counts no GPUs: leave gpus_per_node unset and ask in sbatch's own words, "
    "sbatch=['--exclusive']",
    "job violates accounting/qos policy": "a limit of the account or of the quality of service is reached: wait, or "
    "ask for less (nodes, time)",
    "requested time limit is invalid": "'sinfo' shows the time limit of each partition",
    "requested node configuration is not available": "ask for fewer nodes, GPUs or CPUs, or less memory of a node",
    "more processors requested than permitted": "ask for fewer ranks or CPUs of a node",
    "no such image": "build it, or pull it",
    "could not select device driver": "this machine has no NVIDIA container runtime: set gpus_per_node=0",
}
"""What helps, by words of Slurm's or Docker's own."""


def refuse_unready(executor: run.Executor) -> None:
    """Raise LaunchError when this machine lacks the commands that ``executor`` submits with."""
    if not isinstance(executor, run.SlurmExecutor) or not isinstance(executor.tunnel, run.LocalTunnel):
        return
    if missing := next((name for name in ("sbatch", "sacct", "scancel") if shutil.which(name) is None), None):
        raise LaunchError(
            f"{missing!r} is not on PATH: slurm submits from a login node of the cluster, or over ssh "
            "(host= and user=, or ssh: in the profile)."
        )


def make_folders(executor: run.Executor) -> None:
    """Make the directories that a container writes to, as this user; Docker would make them as root."""
    if isinstance(executor, run.DockerExecutor):
        for volume in executor.volumes:
            host, _, rest = volume.partition(":")
            if host.startswith("/") and not rest.endswith(":ro"):
                Path(host).mkdir(parents=True, exist_ok=True)


def explain_submission(error: BaseException) -> str:
    """Return what a scheduler said when it refused a job, in one sentence with what helps; '' when it is not known."""
    return explain_text(_text(error))


def explain_text(text: str) -> str:
    """Return what ``explain_submission`` does, for what a command wrote."""
    said = _said(text)
    if not said:
        return ""
    advice = next((help_ for words, help_ in ADVICE.items() if words in text.lower()), "")
    return f"{said.rstrip('.')}{'; ' + advice if advice else ''}."


def _text(error: BaseException | None) -> str:
    """Return the words of an error and of those that led to it; a command's own are in its result."""
    parts: list[str] = []
    while error is not None:
        output = getattr(getattr(error, "result", None), "stderr", "")
        parts += [str(words) for words in (output, getattr(error, "explanation", ""), error) if words]
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


def _said(text: str) -> str:
    end, details = _SBATCH_END.search(text), _SBATCH.findall(text)
    if end or details:
        words = [end.group(1)] if end else []
        extra = [d for d in dict.fromkeys(details) if not end or d.lower() not in end.group(1).lower()]
        return f"Slurm refused the job: {'; '.join([*words, *(quoted(d, 200, bare=True) for d in extra[:2])])}"
    if "command not found" in text or "No such file or directory: 'git'" in text:
        line = next(line for line in text.splitlines() if "not found" in line or "No such file" in line)
        return f"a command is missing where the job is submitted: {quoted(line.strip(), 200, bare=True)}"
    if "Host key verification failed" in text:
        return "the host is not known to ssh: connect once by hand, or add it with ssh-keyscan to ~/.ssh/known_hosts"
    if "Disk quota exceeded" in text or "No space left on device" in text:
        return "there is no room for the job's files: free some, or set job_dir (NEMORUN_HOME without one)"
    if any(words in text for words in _DOCKER_DOWN):
        return "no Docker daemon answers: start it, set DOCKER_HOST, or join the group that may use it"
    if found := _DOCKER_API.search(text):
        return f"Docker refused the container: {quoted(' '.join(found.group(1).split()), 300, bare=True)}"
    return ""
