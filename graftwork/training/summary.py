"""What a finished run is known by: the fields of ``summary.json``."""

import hashlib
import math
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import SupportsFloat, TypedDict

import torch
import torch.distributed as dist
from torch import nn

from graftwork import parallel
from graftwork.parallel.record import record_of
from graftwork.training.run import RunFacts

Metrics = dict[str, dict[str, float]]
"""{name: {"before": value, "after": value}}."""


class Summary(TypedDict):
    """The fields of ``summary.json`` in their documented order; losses are per answer token, in nats."""

    recipe_sha256: str | None
    seed: int | None
    steps: int
    train_loss: float | None
    val_loss: float | None
    metrics: Metrics
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    adapter_path: str | None


def summary(
    *,
    facts: RunFacts,
    steps: int,
    train_loss: float | None,
    val_loss: float | None,
    metrics: Metrics,
    tokens_per_second: float,
    parameters: tuple[int, int],
    adapter_path: Path | None,
) -> Summary:
    """Return the fields; ``parameters``: (trainable, total), ``adapter_path``: what the run has made."""
    trainable, total = parameters
    text = facts.recipe_text
    return {
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest() if text is not None else None,
        "seed": facts.seed,
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


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Return (trainable, total) parameter counts of the whole model, without padding; collective over all ranks."""
    parameters = list(module.parameters())
    return whole(p for p in parameters if p.requires_grad), whole(parameters)


def whole(parameters: Iterable[nn.Parameter], weight: Callable[[nn.Parameter], int] = lambda _: 1) -> int:
    """Return the number of elements of the full tensors, summed over pipeline stages and expert ranks.

    ``weight`` says how much an element of a parameter counts.
    """
    dense = expert = 0
    for parameter in parameters:
        record = record_of(parameter)
        if record.expert:
            expert += parameter.numel() * weight(parameter)
        elif not record.copy:
            dense += math.prod(record.sharding.shape) * weight(parameter)
    if not parallel.is_initialized():
        return dense + expert
    return _sum(dense, parallel.pp_group()) + _sum(expert, parallel.model_parallel_group(expert=True))


def finite(value: SupportsFloat | None) -> float | None:
    """Return ``value`` as a float, None when it is missing or not finite (JSON has no NaN)."""
    number = float(value) if value is not None else math.nan
    return number if math.isfinite(number) else None


def _sum(value: int, group: dist.ProcessGroup) -> int:
    if group.size() == 1:
        return value
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, group=group)
    return int(tensor)
