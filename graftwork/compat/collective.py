"""Collectives on Python objects, and agreement: no rank goes on when another one refused."""

from typing import Any, NoReturn

import torch.distributed as dist

from graftwork.errors import GraftworkError


def all_gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's ``value`` (picklable) in rank order; ``[value]`` in a single process."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(error: GraftworkError | None, group: Any = None) -> None:
    """Raise on *every* rank of ``group`` when any rank brings an error: the first one, in rank order."""
    for found in all_gather_objects(error, group):
        if found is not None:
            _raise(found)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return rank ``source``'s ``value`` on every rank of the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def barrier() -> None:
    """Wait for every rank of the world."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _raise(error: GraftworkError) -> NoReturn:
    raise error
