"""What a container needs of this machine before it starts: a daemon that answers, an image, a user who may write."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol

import nemo_run as run

from graftwork.errors import ConfigError, LaunchError, quoted, suggest
from graftwork.executors.process import life_line
from graftwork.executors.process.task import LAUNCHER

ANSWER_SECONDS = 60

_JOB_DIRECTORY = "/nemo_run"
"""Where NeMo Run mounts the job's directory."""


class Job(Protocol):
    """What NeMo Run keeps of a task of an experiment."""

    @property
    def executor(self) -> run.Executor:
        """The executor, which knows the job's directory."""


class _Image(Protocol):
    id: str
    tags: list[str]


class _Images(Protocol):
    """The images of Docker's client, which has no types of its own."""

    def pull(self, name: str) -> _Image: ...

    def list(self) -> list[_Image]: ...


def prepare_container(executor: run.Executor) -> None:
    """Let a Docker executor's container run as the user who submits, and listen to its launcher.

    Other executors stay as they are. Raises ConfigError for a user who cannot write into the job's directory: NeMo Run
    would wait for ever.
    """
    if not isinstance(executor, run.DockerExecutor):
        return
    executor.additional_kwargs = {"user": f"{os.getuid()}:{os.getgid()}", **executor.additional_kwargs}
    check_user(str(executor.additional_kwargs["user"]))
    executor.env_vars[LAUNCHER] = f"{_JOB_DIRECTORY}/{life_line.NAME}"


def find_image(executor: run.Executor) -> None:
    """Name a Docker executor's image by its id: NeMo Run tries to pull a name, even one that is here.

    Raises LaunchError when no daemon answers, ConfigError for an image that is neither here nor to be pulled.
    """
    if isinstance(executor, run.DockerExecutor):
        executor.container_image = image_id(executor.container_image)


@contextmanager
def life_lines(jobs: Iterable[Job]) -> Iterator[None]:
    """Hold the life line of every job that is a container: it saves its state and ends when this process does."""
    with ExitStack() as lines:
        for job in jobs:
            if isinstance(job.executor, run.DockerExecutor):
                lines.enter_context(life_line.held(Path(job.executor.job_dir)))
        yield


def check_user(user: str) -> None:
    """Raise ConfigError for a container's user, ``UID`` or ``UID:GID``, who cannot write what this process makes."""
    if user.partition(":")[0] not in ("0", "root", str(os.getuid())):
        raise ConfigError(
            f"the container's user {quoted(user)} cannot write into the job's directory, made by user {os.getuid()}: "
            "submit as that user, or leave the user out."
        )


def image_id(name: str) -> str:
    """Return the id of an image, pulled when this machine has none of that name; raises as ``find_image``."""
    import docker
    from docker.errors import DockerException, ImageNotFound

    try:
        client = docker.from_env(timeout=ANSWER_SECONDS)
    except DockerException as error:
        reason = _reason(error)
        raise LaunchError(f"no Docker daemon answers ({reason}); is it running, and may you use it?") from error
    with closing(client):
        try:
            found: str = client.images.get(name).id
        except ImageNotFound:
            found = _pulled(client.images, name)
    return found


def _pulled(images: _Images, name: str) -> str:
    try:
        return images.pull(name).id
    except OSError as error:
        here = [tag for image in images.list() for tag in image.tags]
        raise ConfigError(
            f"container_image={quoted(name)} is not on this machine, and pulling it fails ({_reason(error)}); "
            f"{suggest(name, here)}"
        ) from error


def _reason(error: Exception) -> str:
    said = getattr(error, "explanation", None) or str(error)
    return quoted(" ".join(str(said).split()), 160, bare=True).removesuffix(".")
