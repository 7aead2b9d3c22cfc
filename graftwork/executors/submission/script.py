"""What a submission says, word for word: the batch script, the docker command, or the command on this machine."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
from nemo_run.core.execution.docker import DockerJobRequest
from torchx.schedulers.local_scheduler import PopenRequest

from graftwork.executors.placing.placement import placed
from graftwork.executors.process.task import as_task
from graftwork.executors.submission.array import Array
from graftwork.executors.submission.experiment import Experiment, without_ranks
from graftwork.executors.submission.job import Job, task_name


def script_of(recipe: run.Partial, executor: run.Executor, name: str = "graftwork") -> str:
    """Return the text that ``launch`` would submit: for Slurm the batch script, for Docker and here a command line.

    NeMo Run makes it, as it does before every submission; nothing is submitted, and nothing stays. The number of the
    experiment in it is another one at every call. Raises what ``check_placement`` does.
    """
    recipe, executor = placed(recipe, executor)
    job = Job(recipe, executor, task_name(name), wait=True, tail=False, plugins=())
    return _text(job.experiment, job.task, job.executor, job.name)


def script_of_array(
    recipes: Sequence[run.Partial], executor: run.SlurmExecutor, name: str = "sweep", parallel: Optional[int] = None
) -> str:
    """Return the batch script of the job array that ``sweep`` would submit; as ``script_of`` otherwise."""
    fitting = [placed(recipe, executor) for recipe in recipes]
    array = Array([as_task(recipe) for recipe, _ in fitting], [one for _, one in fitting], task_name(name), parallel)
    return _text(array.experiment, array.task, array.executor, array.name)


def _text(experiment: Experiment, task: run.Partial, executor: run.Executor, name: str) -> str:
    directory = Path(experiment._exp_dir)
    with experiment, without_ranks():
        experiment.add(task, executor=executor, name=name)
        experiment.dryrun(log=False)
        request = experiment.jobs[0]._dryrun_info.request
    with suppress(OSError):
        directory.parent.rmdir()  # of this name there are no other experiments
    if isinstance(executor, run.SlurmExecutor):
        return str(request.materialize())
    if isinstance(executor, run.DockerExecutor):
        return _docker_command(request)
    if isinstance(executor, run.LocalExecutor):
        return _local_command(request)
    return str(request)


def _local_command(request: PopenRequest) -> str:
    [[replica]] = request.role_params.values()
    return _lines("env", [f"{name}={value}" for name, value in sorted(replica.env.items())], replica.args)


class _Recorder:
    """Stands for Docker's client: remembers how a container would be run."""

    def __init__(self) -> None:
        self.containers = self.networks = self
        self.arguments: tuple[str, ...] = ()
        self.options: dict[str, Any] = {}

    def run(self, *arguments: str, **options: Any) -> None:
        """Remember what would be run."""
        self.arguments, self.options = arguments, options

    def create(self, *arguments: object, **options: object) -> None:
        """Make no network."""


def _docker_command(request: DockerJobRequest) -> str:
    [container] = request.containers
    recorder = _Recorder()
    container.executor.volumes.append(f"{request.executor.job_dir}:/nemo_run")  # as NeMo Run does when it submits
    container.run(recorder, request.id)
    image, command = recorder.arguments
    return _lines("docker run --rm --detach", _docker_options(recorder.options), [image, *shlex.split(command)])


def _docker_options(options: Mapping[str, Any]) -> list[str]:
    plain = {
        "name": "--name", "hostname": "--hostname", "network": "--network", "working_dir": "--workdir",
        "shm_size": "--shm-size", "runtime": "--runtime", "ipc_mode": "--ipc", "user": "--user",
    }  # fmt: skip
    found = [f"{flag}={options[key]}" for key, flag in plain.items() if options.get(key)]
    for request in options.get("device_requests") or ():
        count = request["Count"]
        found.append(f"--gpus={'all' if count < 0 else count}")
    if options.get("privileged"):
        found.append("--privileged")
    for key, flag in (("labels", "--label"), ("environment", "--env")):
        found += [f"{flag}={name}={value}" for name, value in sorted(options[key].items())]
    return [*found, *(f"--volume={volume}" for volume in options["volumes"])]


def _lines(start: str, options: list[str], command: list[str]) -> str:
    return " \\\n    ".join([start, *(shlex.quote(option) for option in options), shlex.join(command)])
