"""A container on this machine."""

import os
from pathlib import Path
from typing import Optional

import nemo_run as run

from graftwork.errors import ConfigError
from graftwork.executors.cluster.packaging import VARIABLE
from graftwork.executors.cluster.packaging import code as shipped_code
from graftwork.executors.cluster.profile import Profile, settings
from graftwork.executors.local import torchrun_environment

DEVICE = Path("/dev/nvidiactl")
"""Is there wherever the NVIDIA driver is."""

ALL_GPUS = -1

SHARED_MEMORY = "8G"
"""Docker's own 64 MiB are too few for NCCL and for the workers of a data loader; what is not used costs nothing."""


def docker(
    profile: Optional[str] = None,
    container_image: Optional[str] = None,
    container_mounts: Optional[list[str]] = None,
    ntasks_per_node: Optional[int] = None,
    gpus_per_node: Optional[int] = None,
    network: Optional[str] = None,
    shared_memory: Optional[str] = None,
    env: Optional[dict[str, str]] = None,
    code: Optional[str] = None,
    allow_dirty: Optional[bool] = None,
) -> run.DockerExecutor:
    """Return an executor that runs a container here; what is not given stands in ``profile`` (see ``read_profile``).

    Results belong to the user who submits. ``gpus_per_node`` unset asks for GPUs where there are any;
    ``ntasks_per_node`` (ranks) follows from the recipe where it is 1. Raises ConfigError for values that cannot work.
    """
    given = {name: value for name, value in locals().items() if name in Profile.model_fields}
    return _executor(settings(profile, "docker", given), ntasks_per_node or 1)


def _executor(profile: Profile, ranks: int) -> run.DockerExecutor:
    shipped = shipped_code(profile.code, profile.allow_dirty)
    return run.DockerExecutor(
        container_image=profile.container_image,
        ntasks_per_node=ranks,
        launcher=run.Torchrun(rdzv_id=1) if ranks > 1 else None,
        num_gpus=_gpus(profile.gpus_per_node),
        network=profile.network,
        shm_size=profile.shared_memory or SHARED_MEMORY,
        volumes=list(profile.container_mounts),
        additional_kwargs={"user": f"{os.getuid()}:{os.getgid()}"},
        env_vars={**_environment(profile.network), **profile.env, VARIABLE: shipped.record},
        packager=shipped.packager,
    )


def _gpus(wanted: int | None) -> int | None:
    if wanted and not DEVICE.exists():
        raise ConfigError(f"gpus_per_node={wanted}, but this machine has no NVIDIA driver; leave it unset, or 0.")
    return (ALL_GPUS if wanted is None else wanted or None) if DEVICE.exists() else None


def _environment(network: str) -> dict[str, str]:
    env = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "LOGLEVEL": "WARNING",
        **torchrun_environment(),
    }
    if network == "host":
        # torchrun and gloo ask for the container's name, which nobody resolves
        env |= {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if os.getuid():
        env |= {"HOME": "/tmp", "USER": "graftwork"}  # the image knows neither the user nor a home
    return env
