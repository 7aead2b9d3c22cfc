"""Output layer and cross entropy in one: a block of positions at a time, so that no microbatch has whole logits.

The gradient is made in the forward pass, while a block's logits are there; the backward pass only scales it.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from graftwork.parallel.state import tp_group, tp_rank, tp_size

FEWEST_ROWS = 64
"""Positions of a block at least: the whole weight is read again for each block."""
BLOCKS = 13
"""A large microbatch is cut into so many blocks."""


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the fp32 sum of the cross entropies of logits ``hidden weight^T`` against targets [n].

    hidden [n, h] is equal on all tensor-parallel ranks; weight [v/tp, h] holds this rank's rows of the vocabulary, of
    which those from ``vocab_size`` on are padding, without a probability. What comes back for ``hidden`` is this rank's
    part of its gradient: they are summed where the hidden states entered the tensor-parallel region.
    """
    learns = torch.is_grad_enabled()
    wanted = learns and hidden.requires_grad, learns and weight.requires_grad
    total: Tensor = _HeadLoss.apply(hidden, weight, targets, vocab_size, wanted)
    return total


class _HeadLoss(torch.autograd.Function):
    """The sum of losses; keeps the gradients of one unit of it and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, wanted: tuple[bool, bool]
    ) -> Tensor:
        """Go over the blocks and make the gradients that are ``wanted``, of hidden and weight."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=exact)
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        first = tp_rank() * len(weight)
        real = vocab_size - first
        size = min(len(hidden), max(FEWEST_ROWS, -(-len(hidden) // BLOCKS)))
        room = hidden.new_empty(size, min(max(real, 1), len(weight)), dtype=exact)
        for start in range(0, len(hidden), size or 1):
            rows = slice(start, start + size)
            block = _Block(hidden[rows], weight[: room.shape[1]], targets[rows] - first, real, room)
            losses[rows] = block.losses
            if any(wanted):
                block.differentiate()
            if of_hidden is not None:
                of_hidden[rows] = block.of_hidden()
            if of_weight is not None:
                block.add_of_weight(of_weight)
            del block  # before the next one is made
        ctx.save_for_backward(of_hidden, None if of_weight is None else of_weight.to(weight.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients by that of the sum."""
        scaled = (None if one is None else one * gradient for one in ctx.saved_tensors)
        return *scaled, None, None, None


class _Block:
    """Positions whose logits exist at one time: hidden [m, h], and targets [m] as places among this rank's rows.

    Where no row is ``real``, the one in ``weight`` takes no part. In ``room`` stand the logits, then their
    exponentials, then their gradients times the softmax's sum: that is divided out of each product's small side.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, real: int, room: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        self.mine = (targets >= 0) & (targets < min(real, len(weight)))
        self.places = targets.where(self.mine, 0)[:, None]
        logits = room[: len(hidden)]
        if room.dtype == hidden.dtype:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            logits.copy_(F.linear(hidden, weight))
        if real < 1:
            logits.fill_(float("-inf"))
        logits -= _over_ranks(logits.amax(1), dist.ReduceOp.MAX)[:, None]
        aimed = logits.gather(1, self.places)[:, 0].where(self.mine, 0)
        self.values = logits.exp_()
        self.sums, aimed = _over_ranks(torch.stack([self.values.sum(1), aimed])).unbind()
        self.losses = self.sums.log() - aimed

    def differentiate(self) -> None:
        """Turn the exponentials into gradients of the logits, times the sum."""
        self.values.scatter_add_(1, self.places, -self.sums.where(self.mine, 0)[:, None])
        self.gradients = self.values.to(self.weight.dtype)

    def of_hidden(self) -> Tensor:
        """Return this rank's part of the gradient of ``hidden``."""
        return (self.gradients @ self.weight) / self.sums[:, None]

    def add_of_weight(self, total: Tensor) -> None:
        """Add the gradient of the weight to ``total``, in fp32 or more."""
        scaled, rows = (self.hidden / self.sums[:, None]).to(self.weight.dtype), total[: len(self.weight)]
        if rows.dtype == scaled.dtype:
            torch.addmm(rows, self.gradients.t(), scaled, out=rows)
        else:
            rows += self.gradients.t() @ scaled


def _over_ranks(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """Return the values of all tensor-parallel ranks, summed or as ``operation`` says."""
    if tp_size() > 1:
        dist.all_reduce(values, operation, group=tp_group())
    return values
