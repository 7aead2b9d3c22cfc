"""A frozen linear and the low-rank update beside it as one function, which saves its input once."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return ``x W^T + b + scale * (x A^T) B^T`` of x [..., in] with a frozen W [out, in], A [r, in] and B [out, r].

    A and B are cast to the dtype of ``x``. Beside parameters only x and r values a row are kept for the backward pass,
    and no tensor as wide as the output is written more than once.
    """
    out: Tensor = _LowRankLinear.apply(x, weight, bias, A, B, scale)
    return out


def is_whole(base: nn.Module) -> bool:
    """Tell whether calling ``base`` is one product with a frozen weight of its own, its bias and nothing else.

    It is where this rank holds all of megatron-core's linear; a hook may do anything.
    """
    if not isinstance(base, ColumnParallelLinear | RowParallelLinear) or base._forward_hooks or base._forward_pre_hooks:
        return False
    weight: Tensor | None = base.weight
    if weight is None or weight.requires_grad:
        return False
    return tuple(weight.shape) == (base.output_size, base.input_size)


class _LowRankLinear(torch.autograd.Function):
    """See ``low_rank_linear``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """Multiply; the update is added by its second product."""
        flat = x.reshape(-1, x.shape[-1])
        low = (flat @ A.to(x.dtype).t()).mul_(scale)
        out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        torch.addmm(out, low, B.to(x.dtype).t(), out=out)
        ctx.save_for_backward(flat if A.requires_grad else None, low if B.requires_grad else None, weight, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the bias, A and B, each where it is wanted."""
        flat, low, weight, A, B = ctx.saved_tensors
        of_x, _, of_bias, of_A, of_B, _ = ctx.needs_input_grad
        gradient = gradient.reshape(-1, gradient.shape[-1])
        found: list[Tensor | None] = [None] * 6
        if of_x or of_A:
            of_low = (gradient @ B.to(gradient.dtype)).mul_(ctx.scale)
        if of_x:
            of_base = gradient @ weight
            found[0] = torch.addmm(of_base, of_low, A.to(gradient.dtype), out=of_base).view(ctx.shape)
        if of_bias:
            found[2] = gradient.sum(0)
        if of_A:
            found[3] = (of_low.t() @ flat).to(A.dtype)
        if of_B:
            found[4] = (gradient.t() @ low).to(B.dtype)
        return tuple(found)
