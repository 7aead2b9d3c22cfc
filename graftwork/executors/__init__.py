"""Where a recipe runs, and the launch that checks how it ended. What runs is in ``graftwork.recipes``."""

from collections.abc import Callable

import nemo_run as run

from graftwork.executors.docker import docker
from graftwork.executors.launch import launch
from graftwork.executors.local import local
from graftwork.executors.slurm import slurm
from graftwork.executors.sweep import sweep
from graftwork.registry import Registry

EXECUTORS: Registry[Callable[..., run.Executor]] = Registry("executor")
"""Every function that makes an executor, by the name that ``run.executor=`` takes."""

EXECUTORS.enter("local", local)
EXECUTORS.enter("slurm", slurm)
EXECUTORS.enter("docker", docker)

__all__ = ["EXECUTORS", "docker", "launch", "local", "slurm", "sweep"]
