"""A Slurm cluster: from its login node, or over ssh from elsewhere."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

import nemo_run as run

from graftwork.endings import RESUMABLE_EXIT_CODE
from graftwork.executors.cluster.packaging import VARIABLE
from graftwork.executors.cluster.packaging import code as shipped_code
from graftwork.executors.cluster.profile import Profile, settings
from graftwork.executors.local import torchrun_environment

JOB_NAME_PREFIX = "graftwork."
"""NeMo Run finds its task in the queue by what follows the last dot of a job's name."""

RENDEZVOUS_PORTS = 10_000
"""torchrun's port and identity are drawn below this: the same for the same job, others for another."""


def slurm(
    profile: Optional[str] = None,
    account: Optional[str] = None,
    partition: Optional[str] = None,
    qos: Optional[str] = None,
    nodes: Optional[int] = None,
    ntasks_per_node: Optional[int] = None,
    gpus_per_node: Optional[int] = None,
    cpus_per_task: Optional[int] = None,
    memory: Optional[str] = None,
    time: Optional[str] = None,
    launcher: Optional[str] = None,
    warning: Optional[int] = None,
    requeues: Optional[int] = None,
    container_image: Optional[str] = None,
    container_mounts: Optional[list[str]] = None,
    setup: Optional[list[str]] = None,
    env: Optional[dict[str, str]] = None,
    job_dir: Optional[str] = None,
    host: Optional[str] = None,
    user: Optional[str] = None,
    port: Optional[int] = None,
    identity: Optional[str] = None,
    sbatch: Optional[list[str]] = None,
    srun: Optional[list[str]] = None,
    code: Optional[str] = None,
    allow_dirty: Optional[bool] = None,
) -> run.SlurmExecutor:
    """Return an executor that submits to Slurm; what is not given stands in the ``profile`` (see ``read_profile``).

    ``nodes`` and ``ntasks_per_node`` (ranks of a node) follow from the recipe where they are 1. ``host`` and ``user``
    submit over ssh. The other fields are those of ``Profile``. Raises ConfigError for values that cannot work.
    """
    given = {name: value for name, value in locals().items() if name in Profile.model_fields}
    given["ssh"] = _ssh(host=host, user=user, port=port, identity=identity)
    return _executor(settings(profile, "slurm", given), ntasks_per_node or 1)


def _ssh(**given: object) -> dict[str, object] | None:
    found = {name: value for name, value in given.items() if value is not None}
    return found or None


def _executor(profile: Profile, ranks: int) -> run.SlurmExecutor:
    shipped = shipped_code(profile.code, profile.allow_dirty)
    env = {**profile.env, VARIABLE: shipped.record}
    return run.SlurmExecutor(
        account=profile.account,
        partition=profile.partition,
        qos=profile.qos,
        nodes=profile.nodes or 1,
        ntasks_per_node=ranks,
        gpus_per_node=profile.gpus_per_node or None,
        cpus_per_task=profile.cpus_per_task,
        mem=profile.memory,
        time=profile.time,
        signal=f"USR1@{profile.warning}" if profile.warning else None,
        container_image=profile.container_image,
        container_mounts=list(profile.container_mounts),
        container_env=[name for name in env if name.isupper()] if profile.container_image else None,
        env_vars=_exports(profile, env),
        setup_lines="\n".join(_setup_lines(profile, env)) or None,
        srun_args=[*_cpus(profile), *profile.srun] or None,
        additional_parameters=_flags(profile.sbatch),
        job_name_prefix=JOB_NAME_PREFIX,
        launcher=_torchrun() if profile.launcher == "torchrun" else None,
        packager=shipped.packager,
        tunnel=_tunnel(profile),
        poll_estimated_start_time=False,
    )


def _tunnel(profile: Profile) -> run.LocalTunnel | run.SSHTunnel:
    if profile.ssh is not None:
        ssh = profile.ssh
        identity = str(Path(ssh.identity).expanduser()) if ssh.identity else None
        return run.SSHTunnel(host=ssh.host, user=ssh.user, port=ssh.port, identity=identity, job_dir=profile.job_dir)
    # NeMo Run copies nothing to another directory of the same machine: it must be the experiment's own.
    return run.LocalTunnel(job_dir=str(experiments(profile.job_dir)) if profile.job_dir else "")


def experiments(job_dir: str) -> Path:
    """Return where the experiments are, below the directory of all jobs: there NeMo Run looks for them."""
    return Path(job_dir).expanduser() / "experiments"


def base_directory(executor: run.Executor) -> str | None:
    """Return the ``base_dir`` that an experiment on ``executor`` must have; None for NeMo Run's own."""
    tunnel = getattr(executor, "tunnel", None)
    return str(Path(tunnel.job_dir).parent) if isinstance(tunnel, run.LocalTunnel) and tunnel.job_dir else None


def _torchrun() -> run.Torchrun:
    # NeMo Run's fixed port is another job's too where nodes are shared; a drawn identity would differ at every look.
    return run.Torchrun(rdzv_port=f"$((15000 + SLURM_JOB_ID % {RENDEZVOUS_PORTS}))", rdzv_id=1)


def _exports(profile: Profile, env: Mapping[str, str]) -> dict[str, str]:
    """Return NeMo Run's exports: it neither quotes them nor keeps lower case, and fills in what follows a ``$``."""
    exports = {
        "OMP_NUM_THREADS": str(profile.cpus_per_task or 1),
        "TOKENIZERS_PARALLELISM": "false",
        "LOGLEVEL": "WARNING",  # torchrun tells every step of its own otherwise
    }
    if profile.container_image is None and profile.ssh is None:
        # The job starts a bare `python`; without an activated environment that would be another interpreter.
        exports["PATH"] = f"{_literal(os.path.dirname(sys.executable))}:$PATH"
    if profile.launcher == "torchrun":
        exports |= torchrun_environment()
    return {**exports, **{name: _literal(value) for name, value in env.items() if name.isupper()}}


def _literal(value: str) -> str:
    return shlex.quote(value).replace("$", "$$")


def _setup_lines(profile: Profile, env: Mapping[str, str]) -> list[str]:
    lower = [f"export {name}={shlex.quote(value)}" for name, value in env.items() if not name.isupper()]
    return [*lower, *(_requeue_lines(profile.requeues) if profile.requeues else []), *profile.setup]


def _requeue_lines(most: int) -> list[str]:
    """Return what puts a job whose run has saved its state back into the queue, up to ``most`` times.

    srun kills the other ranks once one has ended, so its own exit code may be theirs; it writes each rank's.
    """
    saved = f'[ "$exitcode" = {RESUMABLE_EXIT_CODE} ] || tail -c "+$began" /proc/$$/fd/1 | grep -q "{_RANK_SAVED}"'
    return [
        "began=$(($(stat -Lc %s /proc/$$/fd/1) + 1))",
        f"again() {{ {saved}; }}",
        f"""trap 'again && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ] && scontrol requeue "$SLURM_JOB_ID"' EXIT""",
    ]


_RANK_SAVED = f"Exited with exit code {str(RESUMABLE_EXIT_CODE)[:-1]}[{str(RESUMABLE_EXIT_CODE)[-1]}]"
"""A pattern that does not match itself: the script is traced into the file in which it is looked for."""


def _cpus(profile: Profile) -> list[str]:
    # srun does not take it from sbatch.
    return [f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []


def _flags(flags: list[str]) -> dict[str, str | bool]:
    """Return sbatch's flags as NeMo Run takes them; a job whose dependency failed must not wait for ever."""
    pairs = [flag.removeprefix("--").partition("=") for flag in flags]
    found: dict[str, str | bool] = {name.replace("-", "_"): value if equals else True for name, equals, value in pairs}
    return {"kill_on_invalid_dep": "yes", **found}
