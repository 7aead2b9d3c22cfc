"""Packed rows: which rows of a flat [tokens, ...] tensor belong together, as padded index matrices for batching.

A packed row is a concatenation of segments with boundaries ``cu_seqlens`` (0, l1, l1 + l2, ...). Under context
parallelism every segment is cut into 2 * size chunks and rank r holds chunks r and 2 * size - 1 - r of each segment
(zig-zag), so that the causal work is balanced; an unpacked row is one segment.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.errors import ParallelismError


@dataclass(frozen=True)
class Segment:
    """One segment of a packed row: where it starts in the whole row and how many tokens it has."""

    start: int
    length: int


@dataclass(frozen=True)
class Group:
    """Segments of similar length as padded matrices; ``n`` segments, ``mq`` query rows, ``mk`` key rows.

    queries [n, mq] and keys [n, mk] index rows of the local query tensor and of the whole key tensor;
    query_positions [n, mq] count inside the segment; lengths [n] are the whole segments' lengths;
    real [n, mq] is False on padding.
    """

    queries: Tensor
    keys: Tensor
    query_positions: Tensor
    lengths: Tensor
    real: Tensor


def segments(cu_seqlens: Tensor, padded: Tensor | None = None) -> list[Segment]:
    """Return the non-empty segments; ``padded`` gives the starts where segments are followed by unused rows."""
    bounds = cu_seqlens.tolist()
    starts = bounds if padded is None else padded.tolist()
    lengths = [after - before for before, after in itertools.pairwise(bounds)]
    return [Segment(start, length) for start, length in zip(starts, lengths, strict=False) if length > 0]


def local_positions(length: int, rank: int, size: int) -> Tensor:
    """Return the positions of a segment of ``length`` tokens that context-parallel rank ``rank`` holds, in order."""
    if size == 1:
        return torch.arange(length)
    if length % (2 * size):
        raise ParallelismError(
            f"a sequence of {length} tokens cannot be cut for context_parallel_size={size}: "
            f"its length must be a multiple of {2 * size}."
        )
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def row_positions(row: list[Segment], rank: int, size: int) -> Tensor:
    """Return the rows of a whole packed row that ``rank`` holds, segment after segment."""
    return torch.cat([s.start + local_positions(s.length, rank, size) for s in row])


def batches(row: list[Segment], rank: int = 0, size: int = 1) -> list[Group]:
    """Group segments by length (within a factor of two), so that padding costs at most 4 x the sum of length^2."""
    groups: dict[int, list[tuple[int, Segment]]] = {}
    local = 0
    for segment in row:
        groups.setdefault(segment.length.bit_length(), []).append((local if size > 1 else segment.start, segment))
        local += segment.length // size
    return [_batch(group, rank, size) for group in groups.values()]


def _batch(group: list[tuple[int, Segment]], rank: int, size: int) -> Group:
    firsts = torch.tensor([first for first, _ in group])[:, None]
    starts = torch.tensor([s.start for _, s in group])[:, None]
    lengths = torch.tensor([s.length for _, s in group])
    longest = int(lengths.max())
    positions = [local_positions(s.length, rank, size) for _, s in group]
    query_positions = torch.nn.utils.rnn.pad_sequence(positions, batch_first=True)
    rows = torch.arange(query_positions.shape[1])[None].expand(len(group), -1)
    real = rows < (lengths // size)[:, None]
    keys = starts + torch.minimum(torch.arange(longest)[None], lengths[:, None] - 1)
    return Group(firsts + torch.where(real, rows, 0), keys, query_positions, lengths, real)
