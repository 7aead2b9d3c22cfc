"""SwiGLU that keeps its input and nothing else, with its gradient written in one piece.

megatron-core's own is compiled on a GPU; elsewhere it makes a dozen tensors and joins the gradients of both halves.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

AT_A_TIME = 1 << 17
"""Values of one half that the backward pass takes at a time: its tensors then stay in a core's cache. Other devices
take all, and so do plans, which look at shapes alone."""


class SwiGLU(torch.autograd.Function):
    """``silu(a) * b`` of [..., 2 f] that holds a and b side by side."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        """[..., 2 f] -> [..., f]."""
        ctx.save_for_backward(joined)
        gate, up = joined.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """[..., f] -> [..., 2 f]."""
        (joined,) = ctx.saved_tensors
        found = torch.empty(joined.shape, dtype=joined.dtype, device=joined.device)
        size = max(1, AT_A_TIME // gradient.shape[-1] if gradient.is_cpu else gradient.numel())
        blocks = (one.reshape(-1, one.shape[-1]).split(size) for one in (joined, gradient, found))
        for block in zip(*blocks, strict=True):
            _differentiate(*block)
        return found


def _differentiate(joined: Tensor, gradient: Tensor, out: Tensor) -> None:
    (gate, up), (of_gate, of_up) = joined.chunk(2, -1), out.chunk(2, -1)
    torch.mul(F.silu(gate), gradient, out=of_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)


def swiglu(joined: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    """Return SwiGLU of ``joined + bias``; megatron-core's other arguments are about 8-bit and offloaded inputs."""
    out: Tensor = SwiGLU.apply(joined if bias is None else joined + bias)
    return out


def weighted_swiglu(joined: Tensor, bias: Tensor | None, weights: Tensor, *_: object) -> Tensor:
    """Return SwiGLU times ``weights``, in the dtype of ``joined``."""
    return (swiglu(joined, bias) * weights).to(joined.dtype)


def install() -> None:
    """Let megatron-core's MLPs use it where nothing is compiled."""
    if not torch.cuda.is_available():
        from megatron.core.transformer import mlp

        setattr(mlp, "bias_swiglu_impl", swiglu)  # noqa: B010
        setattr(mlp, "weighted_bias_swiglu_impl", weighted_swiglu)  # noqa: B010
