"""A range of a tensor laid flat, as blocks that dist_checkpointing can place in the full tensor."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from graftwork.parallel.sharded_files import Entry, parts_of

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along every axis."""


def flat_range(entry: Entry, data: Tensor, start: int) -> list[ShardedTensor]:
    """Describe ``data`` [n], elements ``start`` to ``start + n`` of a local tensor laid flat, as blocks of it.

    ``entry`` places the local tensor, which may be on the meta device. The blocks look into ``data``, and each is the
    only copy of what it holds among the ranks that share the tensor out.
    """
    local = entry.data
    assert local is not None and local.is_contiguous()
    found = []
    for part in parts_of(entry):
        assert part.data is not None
        corner = _corner(int(part.data.storage_offset()), local.shape)
        at = 0
        for block in boxes(tuple(local.shape), start, start + len(data)):
            size = math.prod(block[1])
            values = data[at : at + size].view(block[1])
            found += _meeting(part, (corner, tuple(part.data.shape)), block, values)
            at += size
    return found


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield elements [start, stop) of a row-major tensor of ``shape`` as the fewest blocks, in order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside of one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    before = index * math.prod(shape[1:])
    for offsets, sizes in boxes(shape[1:], start - before, stop - before):
        yield (index, *offsets), (1, *sizes)


def _corner(offset: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the coordinates of the element at ``offset``."""
    found: list[int] = []
    for size in reversed(shape):
        found.insert(0, offset % size)
        offset //= size
    return tuple(found)


def _meeting(part: ShardedTensor, box: Box, block: Box, values: Tensor) -> list[ShardedTensor]:
    """Return what ``block`` of the local tensor holds of ``part``, which fills ``box`` of it."""
    low = [max(a, b) for a, b in zip(box[0], block[0])]
    high = [min(a + n, b + m) for a, n, b, m in zip(*box, *block)]
    if any(a >= b for a, b in zip(low, high)):
        return []
    for axis, (a, b, begin) in enumerate(zip(low, high, block[0])):
        values = values.narrow(axis, a - begin, b - a)
    lead, replica = part.prepend_axis_num, part.replica_id
    assert isinstance(replica, tuple), "(tied copy, tensor rank, data rank)"
    inside = (o + a - b for o, a, b in zip(part.global_offset[lead:], low, box[0]))
    return [
        replace(
            part,
            data=values,
            dtype=values.dtype,
            local_shape=tuple(values.shape),
            global_offset=(*part.global_offset[:lead], *inside),
            axis_fragmentations=None,  # no regular grid
            replica_id=(*replica[:-1], 0),
        )
    ]
