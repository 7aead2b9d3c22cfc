"""Context parallelism by gathering keys and values: exact for every mask, and gloo can do it."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from graftwork.batch import IGNORED, Batch
from graftwork.core.segments import Segment, row_positions, segments
from graftwork.parallel.state import cp_rank, cp_size, tp_size


class _Context(Protocol):
    group: ProcessGroup


class _Gather(torch.autograd.Function):
    """All-gather along a new first dimension; the backward sums the gradients that every rank has for our part."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


def gather_rows(local: Tensor, row: list[Segment], group: ProcessGroup) -> Tensor:
    """Return the whole [tokens, ...] row from every rank's zig-zag part [tokens / size, ...], in natural order."""
    order = torch.cat([row_positions(row, rank, group.size()) for rank in range(group.size())])
    parts: Tensor = _Gather.apply(local, group)
    return parts.flatten(0, 1)[order.argsort().to(local.device)]


def slice_batch(batch: Batch) -> Batch:
    """Return this context-parallel rank's zig-zag part of every row, or of every sample of a packed line.

    A line's boundaries stay those of the whole line. Raises ParallelismError for what cannot be cut: ``cuttable``.
    """
    if cp_size() == 1:
        return batch
    row = [Segment(0, batch.tokens.shape[1])] if batch.cu_seqlens is None else segments(batch.cu_seqlens)
    return batch.at_positions(row_positions(row, cp_rank(), cp_size()).to(batch.tokens.device))


def cuttable(batch: Batch) -> Batch:
    """Return packed rows whose samples can be cut over the context-parallel ranks; others, and one rank's, as they are.

    Each sample is laid so that 2 * ranks divide its length, and rows stay of one length: at least as long as they
    were, longer where that does not suffice. What is laid behind a sample repeats its last token without a target, so
    that no answer token ever sees it. Samples at the end of a row that have no target (its padding) give way first.
    """
    if cp_size() == 1 or batch.cu_seqlens is None:
        return batch
    unit, length = 2 * cp_size(), batch.tokens.shape[1]
    rows = _samples(batch.cu_seqlens, batch.labels)
    least = max([length, *(sum(_up(s.length, unit) for s in row) for row in rows)])
    width = _up(least, unit * tp_size())  # sequence parallelism cuts the part of a rank again
    laid = [_lay(row, length, width, unit) for row in rows]
    most = max(len(edges) for _, edges in laid)
    bounds = [[*edges, *[width] * (most - len(edges))] for _, edges in laid]
    source = torch.stack([places for places, _ in laid])
    device = batch.tokens.device
    return batch.rearranged(source.to(device), torch.tensor(bounds, dtype=torch.int32, device=device))


def _samples(cu_seqlens: Tensor, labels: Tensor) -> list[list[Segment]]:
    """Return the segments of every row, up to the last one that has a target."""
    places = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(labels == IGNORED, -1, places).amax(1).tolist()
    return [[s for s in segments(bounds) if s.start <= end] for bounds, end in zip(cu_seqlens.cpu(), last)]


def _lay(row: list[Segment], length: int, width: int, unit: int) -> tuple[Tensor, list[int]]:
    """Return, for every place of a row of ``width``, where its token stood (-1 - place: without a target), and edges.

    What no sample needs are further segments, none longer than rows were: positions reach no further than before.
    """
    parts, edges = list[Tensor](), [0]
    for s in row:
        even = _up(s.length, unit)
        parts += [torch.arange(s.start, s.start + s.length), torch.full((even - s.length,), -s.start - s.length)]
        edges.append(edges[-1] + even)
    used, step = edges[-1], max(unit, length // unit * unit)
    edges += [] if used == width else [*range(used + step, width, step), width]
    return torch.cat([*parts, torch.full((width - used,), -length)]), edges


def _up(length: int, unit: int) -> int:
    return length + -length % unit
