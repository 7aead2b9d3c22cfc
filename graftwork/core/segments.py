"""Packed rows: which rows of a flat [tokens, ...] tensor belong together, as padded index matrices for batching.

A packed row is a concatenation of segments with boundaries ``cu_seqlens`` (0, l1, l1 + l2, ...). Under context
parallelism every segment is cut into 2 * size chunks and rank r holds chunks r and 2 * size - 1 - r of each segment
(zig-zag), so that the causal work is balanced; an unpacked row is one segment.
"""

import itertools
from collections.abc import Iterator
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
class Run:
    """Neighbouring queries of a segment on one rank: ``count`` of them, the last ones of those that ``keys`` reach.

    row: the first one's place in the rank's part of the row; start: the segment's in the whole row; keys: how many of
    the segment's keys they may see. Queries that see each other backwards too have ``keys`` of the whole segment, and
    their own place in it does not matter.
    """

    row: int
    count: int
    start: int
    keys: int


@dataclass(frozen=True)
class Group:
    """Runs of similar size as padded matrices: ``n`` runs, ``mq`` query rows, ``mk`` key rows.

    queries [n, mq] and keys [n, mk] index rows of the local query tensor and of the whole key tensor; counts and seen
    [n] are the runs' numbers of queries and keys; real [n, mq] is False on padding.
    """

    queries: Tensor
    keys: Tensor
    counts: Tensor
    seen: Tensor
    real: Tensor

    @property
    def square(self) -> bool:
        """Whether every run begins with its segment, so that queries and keys count alike."""
        return torch.equal(self.counts, self.seen)

    def allowed(self, causal: bool) -> Tensor:
        """Return where a query may look, bool [n, mq, mk]; behind the end of a run, anything."""
        at = torch.arange(self.keys.shape[1])
        last = self.seen[:, None].expand_as(self.queries) - 1
        if causal:
            last = torch.minimum(last, torch.arange(self.queries.shape[1]) + (self.seen - self.counts)[:, None])
        return at <= last[..., None]


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
    chunks = torch.arange(length).split(_chunk(length, size))
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def row_positions(row: list[Segment], rank: int, size: int) -> Tensor:
    """Return the rows of a whole packed row that ``rank`` holds, segment after segment."""
    return torch.cat([s.start + local_positions(s.length, rank, size) for s in row])


def runs(row: list[Segment], rank: int, size: int, causal: bool) -> Iterator[Run]:
    """Yield the queries that ``rank`` holds of every segment: a whole one, or its two chunks, in local order.

    A causal chunk sees the segment up to its own end: all ranks have as many pairs of queries and keys.
    """
    local = 0
    for segment in row:
        if size == 1:
            yield Run(segment.start, segment.length, segment.start, segment.length)
            continue
        chunk = _chunk(segment.length, size)
        for place in (rank, 2 * size - 1 - rank):
            yield Run(local, chunk, segment.start, chunk * (place + 1) if causal else segment.length)
            local += chunk


def batches(row: list[Segment], rank: int = 0, size: int = 1, causal: bool = True) -> list[Group]:
    """Group runs by size (within a factor of two), so that padding costs at most 4 x what the runs themselves do."""
    groups: dict[tuple[int, int], list[Run]] = {}
    for run in runs(row, rank, size, causal):
        groups.setdefault((run.count.bit_length(), run.keys.bit_length()), []).append(run)
    return [_batch(group) for group in groups.values()]


def _chunk(length: int, size: int) -> int:
    if length % (2 * size):
        raise ParallelismError(
            f"a sequence of {length} tokens cannot be cut for context_parallel_size={size}: "
            f"its length must be a multiple of {2 * size}."
        )
    return length // (2 * size)


def _batch(group: list[Run]) -> Group:
    firsts, starts = (torch.tensor(numbers)[:, None] for numbers in zip(*((run.row, run.start) for run in group)))
    counts, seen = (torch.tensor(numbers) for numbers in zip(*((run.count, run.keys) for run in group)))
    queries, keys = (torch.arange(int(sizes.max()))[None] for sizes in (counts, seen))
    return Group(
        queries=firsts + torch.minimum(queries, counts[:, None] - 1),
        keys=starts + torch.minimum(keys, seen[:, None] - 1),
        counts=counts,
        seen=seen,
        real=queries < counts[:, None],
    )
