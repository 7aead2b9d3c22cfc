"""Collectives on Python objects, and agreement: no rank goes on when another one refused."""

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from graftwork.errors import GraftworkError

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def all_gather_objects(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Return every rank's ``value`` (picklable) in rank order; ``[value]`` in a single process."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def gather_objects(value: T) -> list[T] | None:
    """Return every rank's ``value`` on the world's first rank, in rank order; None on the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    box: list[T | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, box, dst=0)
    return box  # type: ignore[return-value]


def agree(error: GraftworkError | None, group: ProcessGroup | None = None) -> None:
    """Raise on *every* rank of ``group`` when any rank brings an error: the first one, in rank order."""
    for found in all_gather_objects(error, group):
        if found is not None:
            _raise(found)


def agreed(
    action: Callable[[], T],
    catch: tuple[type[E], ...] = (),
    explain: Callable[[E], GraftworkError] | None = None,
    group: ProcessGroup | None = None,
) -> T:
    """Return this rank's ``action()``; when it fails on any rank of ``group``, every rank raises the same error.

    A GraftworkError is an error of its own; the exceptions in ``catch`` become one through ``explain``. ``action`` must
    contain no collective: a rank that fails would not take part in it.
    """
    error: GraftworkError | None = None
    results: list[T] = []
    try:
        results.append(action())
    except GraftworkError as refused:
        error = refused
    except catch as problem:
        assert explain is not None, "whoever catches a library's exception explains it"
        error = explain(problem)
    agree(error, group)
    return results[0]


def broadcast_object(value: T, source: int = 0) -> T:
    """Return rank ``source``'s ``value`` on every rank of the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def reduce_scatter_flat(shard: Tensor, flat: Tensor, group: ProcessGroup) -> Work:
    """Begin to sum ``flat`` (one dimension) over ``group`` into every rank's equal ``shard`` of it."""
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name until torch 2.13
    work: Work = call(shard, flat, group=group, async_op=True)
    return work


def all_gather_flat(flat: Tensor, shard: Tensor, group: ProcessGroup) -> None:
    """Fill ``flat`` (one dimension) with the equal shards of all ranks of ``group``."""
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.13
    call(flat, shard, group=group)


def barrier() -> None:
    """Wait for every rank of the world."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def world_rank() -> int:
    """Rank in the world, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks in the world, 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _raise(error: GraftworkError) -> NoReturn:
    raise error
