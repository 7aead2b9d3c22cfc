"""What a finished run is known by: the fields of ``summary.json``."""

import hashlib
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from graftwork import parallel
from graftwork.optim import adapter_of
from graftwork.training.optimizer.gradients import is_expert


def summary(
    *,
    recipe_text: str | None,
    seed: int | None,
    steps: int,
    train_loss: float | None,
    val_loss: float | None,
    metrics: dict[str, dict[str, float]],
    tokens_per_second: float,
    parameters: tuple[int, int],
    adapter_path: Path | None,
) -> dict[str, Any]:
    """Return the fields in their documented order; losses are per answer token, in nats."""
    trainable, total = parameters
    return {
        "recipe_sha256": hashlib.sha256(recipe_text.encode()).hexdigest() if recipe_text is not None else None,
        "seed": seed,
        "steps": steps,
        "train_loss": train_loss,
        "val_loss": val_loss,
        "metrics": metrics,
        "tokens_per_second": round(tokens_per_second, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "adapter_path": str(adapter_path) if adapter_path is not None else None,
    }


def peak_memory_bytes() -> int:
    """Return this process's peak: device memory where there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # the kernel counts in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count_parameters(module: Any) -> tuple[int, int]:
    """Return (trainable, total) un-sharded parameter counts of the whole model; collective over all ranks."""
    named = list(module.named_parameters())
    adapters = [(n, p) for n, p in named if adapter_of(n)]
    trained = whole([(n, p) for n, p in named if p.requires_grad])
    shape = getattr(module, "shape", None)
    # The shape's arithmetic leaves out vocabulary padding, which depends on the layout.
    base = shape.total_parameters() if shape is not None else whole([(n, p) for n, p in named if not adapter_of(n)])
    total = base + whole(adapters)
    return (trained if adapters or trained < total else total), total


def whole(named: list[tuple[str, nn.Parameter]]) -> int:
    """Return the un-sharded number of elements of ``named``, summed over pipeline stages and expert ranks."""
    dense = sum(_full(p) for n, p in named if not is_expert(n, p) and not getattr(p, "shared", False))
    expert = sum(p.numel() for n, p in named if is_expert(n, p))
    if not parallel.is_initialized():
        return dense + expert
    return _sum(dense, parallel.pp_group()) + _sum(expert, parallel.model_parallel_group(expert=True))


def finite(value: Any) -> float | None:
    """Return ``value`` as a float, None when it is missing or not finite (JSON has no NaN)."""
    number = float(value) if value is not None else math.nan
    return number if math.isfinite(number) else None


def _full(parameter: nn.Parameter) -> int:
    sharding = getattr(parameter, "sharding", None)
    if sharding is not None:
        return math.prod(sharding.shape)
    cut = getattr(parameter, "tensor_model_parallel", False)
    return parameter.numel() * (parallel.tp_size() if cut and parallel.is_initialized() else 1)


def _sum(value: int, group: dist.ProcessGroup) -> int:
    if group.size() == 1:
        return value
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, group=group)
    return int(tensor)
