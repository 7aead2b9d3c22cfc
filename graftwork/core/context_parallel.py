"""Context parallelism by gathering keys and values: exact for every mask, and gloo can do it."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from graftwork.batch import Batch
from graftwork.core.segments import Segment, local_positions, row_positions
from graftwork.errors import ParallelismError
from graftwork.parallel.state import cp_rank, cp_size


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
    """Return this context-parallel rank's zig-zag part of every row; raises ParallelismError when they are packed."""
    if cp_size() == 1:
        return batch
    if batch.packed:
        raise ParallelismError("packing with context_parallel_size > 1 is not supported; set data.packing=False.")
    return batch.at_positions(local_positions(batch.tokens.shape[1], cp_rank(), cp_size()).to(batch.tokens.device))
