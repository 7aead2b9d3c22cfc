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
BLOCKS, BLOCKS_OF_TWO = 9, 13
"""A large microbatch is cut into so many blocks, so that one takes less than an eighth of the whole logits; more where
a block exists twice, in fp32 and in the precision of the weight."""
ROUND = 8
"""Positions of a large block are a multiple of this, as the kernels of matrix products like them."""


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
        rows_of_weight = min(max(real, 1), len(weight))
        blocks = BLOCKS if hidden.dtype == exact else BLOCKS_OF_TWO
        size = min(len(hidden), max(FEWEST_ROWS, len(hidden) // (blocks * ROUND) * ROUND))
        for start in range(0, len(hidden), size or 1):
            rows = slice(start, start + size)
            block = _Block(hidden[rows], weight[:rows_of_weight], targets[rows] - first, real)
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

    Where no row is ``real``, the one in ``weight`` takes no part. In one tensor stand the logits, then their
    exponentials, then their gradients times the softmax's sum: that is divided out of each product's small side.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, real: int) -> None:
        self.hidden, self.weight = hidden, weight
        self.mine = (targets >= 0) & (targets < min(real, len(weight)))
        self.places = targets.where(self.mine, 0)[:, None]
        logits = _product(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
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


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return ``hidden weight^T`` of few rows and many: on a CPU oneDNN makes it up to twice as fast as torch's BLAS."""
    if hidden.is_cpu and hidden.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
        return product
    return F.linear(hidden, weight)


def _over_ranks(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """Return the values of all tensor-parallel ranks, summed or as ``operation`` says."""
    if tp_size() > 1:
        dist.all_reduce(values, operation, group=tp_group())
    return values
