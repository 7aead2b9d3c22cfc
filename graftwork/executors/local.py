"""This machine: one process, or several under torchrun."""

import os
import sys
from typing import Optional

import fiddle as fdl
import nemo_run as run

from graftwork.errors import ConfigError, suggest

LAUNCHERS = ("torchrun",)


def local(ntasks: int = 1, launcher: Optional[str] = None, env: Optional[dict[str, str]] = None) -> run.LocalExecutor:
    """Return an executor of ``ntasks`` processes on this machine; more than one runs under torchrun.

    ``env`` adds to the task's environment and wins over the defaults. Raises ConfigError for a wrong size or launcher.
    """
    if ntasks < 1:
        raise ConfigError(f"ntasks={ntasks}: a local executor runs at least 1 process.")
    if launcher is not None and launcher not in LAUNCHERS:
        raise ConfigError(f"launcher={launcher!r} is not known; {suggest(launcher, LAUNCHERS)}")
    return run.LocalExecutor(
        ntasks_per_node=ntasks,
        launcher=launcher or ("torchrun" if ntasks > 1 else None),
        env_vars={**task_environment(), **(env or {})},
    )


def built(executor: run.Executor | run.Config | None) -> run.Executor:
    """Return an executor as it is launched on; None is this machine."""
    if executor is None:
        return local()
    return fdl.build(executor) if isinstance(executor, fdl.Buildable) else executor


def task_environment() -> dict[str, str]:
    """Return what every local task needs: this interpreter first on PATH, and quiet, uncontended CPU threads."""
    here = os.path.dirname(sys.executable)
    return {
        # NeMo Run starts bare `python` and `torchrun`; without an activated environment that is another interpreter.
        "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
        "PYTHONUNBUFFERED": "1",
        "LOGLEVEL": os.environ.get("LOGLEVEL", "WARNING"),  # torchrun tells every step of its own otherwise
        **torchrun_environment(),
    }


def torchrun_environment() -> dict[str, str]:
    """Return what lets torchrun pass a stop on to its ranks and wait until they have saved their state."""
    return {
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # SIGUSR1 would end torchrun alone
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300"),
    }
