"""Bringing one stack's tensors together: from every rank's parts to full tensors on the first rank."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graftwork.parallel.state import dp_group, expert_dp_group
from graftwork.peft.adapter import Adapter, sharding_of
from graftwork.peft.stack import Stack

Part = tuple[Any, int, int, Tensor]
"""(sharding, rank, size, local tensor)"""


def gather_tensors(stack: Stack, names: Sequence[str]) -> dict[str, Tensor] | None:
    """Return the full CPU tensors ``<adapter>.<site>.<tensor>`` on global rank 0, None on the others.

    Collective. Each distinct part travels once: replicas of data-parallel and tensor-parallel ranks send nothing.
    """
    mine = {key: part for name in names for key, part in _parts(stack, name).items()}
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _joined([mine])
    box: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, box, dst=0)
    return None if box is None else _joined(box)


def _parts(stack: Stack, name: str) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for item in stack.grafted[name]:
        if not _first_replica(item.adapter):
            continue
        rank, size = item.adapter.tp
        for key, parameter in item.adapter.named_parameters():
            sharding = sharding_of(parameter)
            if sharding.dim is not None or rank == 0:
                parts[f"{name}.{item.site.name}.{key}"] = (sharding, rank, size, parameter.detach().cpu())
        for key, tensor in item.adapter.extra_tensors().items():
            if rank == 0:
                parts[f"{name}.{item.site.name}.{key}"] = (None, 0, 1, tensor.cpu())
    return parts


def _first_replica(adapter: Adapter) -> bool:
    """Tell whether this rank is the one that speaks for its data-parallel replicas."""
    group = dp_group(with_context_parallel=True) if adapter.parallel else expert_dp_group()
    return not dist.is_initialized() or dist.get_rank(group) == 0


def _joined(sent: Sequence[dict[str, Part]]) -> dict[str, Tensor]:
    collected: dict[str, dict[int, Part]] = defaultdict(dict)
    for parts in sent:
        for key, part in parts.items():
            collected[key][part[1]] = part
    return {key: _join(parts) for key, parts in sorted(collected.items())}


def _join(parts: dict[int, Part]) -> Tensor:
    sharding, _, size, tensor = parts[min(parts)]
    if sharding is None or sharding.dim is None or size == 1:
        full = tensor if sharding is None else sharding.join([tensor])
    else:
        full = sharding.join([parts[r][3] for r in range(size)])
    return full.to(torch.float32).contiguous().clone()
