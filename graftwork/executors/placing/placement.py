"""Whether a recipe's ranks fit an executor: all arithmetic before anything starts."""

from collections.abc import Callable
from typing import Any

import fiddle as fdl
import nemo_run as run
import torch

from graftwork.cache import cache_directory
from graftwork.errors import ConfigError, ParallelismError
from graftwork.executors.placing.paths import mounts, resolved
from graftwork.layout import Dimensions, Layout

ON_GPUS = ("gpu", "cuda")


def check_placement(recipe: run.Partial, executor: run.Executor | None) -> None:
    """Raise ParallelismError or ConfigError, naming the field, unless the ranks of ``recipe`` fit ``executor``.

    ``executor`` None is this machine. Ranks must fit the layout, the shape and the batch; an executor's nodes and
    processes of a node must be the recipe's, or 1, which follows the recipe.
    """
    trainer = getattr(recipe, "trainer", None)
    nodes, devices = wanted(recipe)
    if trainer is None:
        return
    _check_here(trainer, nodes, devices, executor)
    _check_layout(recipe, nodes * devices)
    if executor is not None:
        _check_sizes(executor, nodes, devices)


def wanted(recipe: run.Partial) -> tuple[int, int]:
    """Return the (nodes, devices of a node) that a recipe asks for; (1, 1) without a trainer."""
    trainer = getattr(recipe, "trainer", None)
    if trainer is None:
        return 1, 1
    return int(getattr(trainer, "num_nodes", None) or 1), count_devices(getattr(trainer, "devices", 1))


def count_devices(devices: object) -> int:
    """Return how many processes of a node Lightning's ``devices`` means; the command line hands ``2`` over as text.

    ``auto`` and -1 are all GPUs of this machine, 1 without any. Raises ConfigError for what is no number.
    """
    if isinstance(devices, list):
        return len(devices)
    text = str(devices).strip()
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    if not text.isdigit() or int(text) == 0:
        raise ConfigError(f"trainer.devices={devices!r} is no number of devices; 1 and more, or 'auto', are valid.")
    return int(text)


def fitted(recipe: run.Partial, executor: run.Executor) -> run.Executor:
    """Return a copy of ``executor`` with the nodes, processes and GPUs that ``recipe`` asks for.

    Raises what ``check_placement`` does. Without a trainer, and in the cloud, an executor keeps its own sizes.
    """
    check_placement(recipe, executor)
    nodes, devices = wanted(recipe)
    made = executor.clone()
    if not hasattr(recipe, "trainer"):
        return made
    if isinstance(made, run.SlurmExecutor):
        _fit_slurm(made, nodes, devices)
    elif isinstance(made, run.LocalExecutor | run.DockerExecutor):
        made.ntasks_per_node = devices
        made.launcher = made.launcher or (run.Torchrun(rdzv_id=1) if devices > 1 else None)
        if isinstance(made, run.DockerExecutor) and made.num_gpus:
            made.num_gpus = devices
    return made


def _fit_slurm(executor: run.SlurmExecutor, nodes: int, devices: int) -> None:
    executor.nodes, executor.ntasks_per_node = nodes, devices
    if executor.gpus_per_node:
        executor.gpus_per_node = devices
    if nodes == 1 and executor.launcher is None:
        # Lightning takes the node's name otherwise, which not every node resolves.
        executor.env_vars.setdefault("MASTER_ADDR", "127.0.0.1")


def _check_here(trainer: Any, nodes: int, devices: int, executor: run.Executor | None) -> None:
    accelerator = str(getattr(trainer, "accelerator", "auto"))
    if executor is not None and not isinstance(executor, run.LocalExecutor):
        return
    present = torch.cuda.device_count()
    if accelerator in ON_GPUS and present == 0:
        raise ConfigError(f"trainer.accelerator={accelerator!r}, but this machine has no GPU; valid: 'cpu' or 'auto'.")
    if present and accelerator in (*ON_GPUS, "auto") and devices > present:
        raise ParallelismError(
            f"trainer.devices={devices} is more than the {present} GPU(s) of this machine; "
            f"valid: 1 to {present}, or more with trainer.accelerator='cpu'."
        )
    if nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes} needs an executor that reaches {nodes} machines, such as run.executor=slurm."
        )


def _check_layout(recipe: run.Partial, ranks: int) -> None:
    from graftwork.training import MegatronStrategy  # a task without a trainer need not wait for lightning

    strategy = getattr(recipe.trainer, "strategy", None)
    if not isinstance(strategy, fdl.Buildable) or strategy.__fn_or_cls__ is not MegatronStrategy:
        return
    layout = Layout.among(strategy.__arguments__)
    layout.data_parallel_size(ranks)
    shape = _shape(recipe)
    if shape is not None:
        layout.check_shape(shape)
    rows, micro = (getattr(recipe.data, name, None) for name in ("global_batch_size", "micro_batch_size"))
    if isinstance(rows, int) and isinstance(micro, int):
        layout.check_batch(rows, micro, ranks)
    if getattr(recipe.data, "packing", False):
        layout.check_packing(recipe.data.seq_length)


def _shape(recipe: run.Partial) -> Dimensions | None:
    shape = getattr(recipe.model, "shape", None)
    built: Dimensions | None = fdl.build(shape) if isinstance(shape, fdl.Buildable) else shape
    return built


def _check_sizes(executor: run.Executor, nodes: int, devices: int) -> None:
    asked = {"nodes": _size(executor.nnodes), "ntasks_per_node": _size(_processes(executor))}
    fields = {"nodes": ("trainer.num_nodes", nodes), "ntasks_per_node": ("trainer.devices", devices)}
    fixed = not isinstance(executor, run.SlurmExecutor | run.LocalExecutor | run.DockerExecutor)
    for name, given in asked.items():
        field, needed = fields[name]
        if given is not None and given != needed and (given != 1 or fixed):
            raise ParallelismError(
                f"the recipe has {field}={needed}, but the executor {name}={given}: "
                f"set one of them to the other's value{', or leave ' + name + ' at 1' if not fixed else ''}."
            )
    if nodes > 1 and isinstance(executor, run.LocalExecutor | run.DockerExecutor):
        raise ParallelismError(f"trainer.num_nodes={nodes}, but {executor.info()} is one machine; slurm reaches more.")
    if fixed and devices > 1 and executor.launcher is None:
        raise ConfigError(f"trainer.devices={devices}, but {executor.info()} has no launcher='torchrun' to start them.")
    gpus = _gpus(executor)
    if gpus is not None and devices > gpus:
        raise ParallelismError(f"trainer.devices={devices} is more than the executor's gpus_per_node={gpus}.")


def _processes(executor: run.Executor) -> Callable[[], int]:
    own: Callable[[], int] = executor.nproc_per_node
    if isinstance(executor, run.SlurmExecutor):  # its own answer is the node's GPUs where one task is set
        return lambda: int(executor.torchrun_nproc_per_node or executor.ntasks_per_node)
    return own


def _size(ask: Callable[[], int]) -> int | None:
    try:
        return int(ask())
    except (RuntimeError, TypeError, ValueError):  # not told, or decided elsewhere
        return None


def _gpus(executor: run.Executor) -> int | None:
    gpus = getattr(executor, "gpus_per_node", None) or getattr(executor, "num_gpus", None)
    return gpus if isinstance(gpus, int) and gpus > 0 else None


def placed(recipe: run.Partial, executor: run.Executor) -> tuple[run.Partial, run.Executor]:
    """Return ``recipe`` and ``executor`` as they are launched: sizes from the recipe, paths as the job sees them.

    Raises what ``check_placement`` does. What was placed already comes back as it is.
    """
    executor = fitted(recipe, executor)
    recipe = resolved(recipe, executor)
    if isinstance(executor, run.DockerExecutor):
        known = {volume.split(":")[1] for volume in executor.volumes}
        executor.volumes += [volume for volume in mounts(recipe) if volume.split(":")[1] not in known]
        executor.env_vars.setdefault("GRAFTWORK_CACHE", str(cache_directory().absolute()))
    return recipe, executor
