"""Rotary positions as one function: nothing is joined, and nothing but sines and cosines is kept for the backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rotation(torch.autograd.Function):
    """Turns the pairs (i, i + r/2) of the first r of the last dimension; the rest passes."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """t [s, b, heads, d], cos and sin [s, 1 or b, 1, r]."""
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _turned(t, cos, (-first, second))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Turn the gradient back."""
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _turned(gradient, cos, (second, -first)), None, None


def _turned(t: Tensor, cos: Tensor, across: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``t cos`` plus the other half of each pair times its factor."""
    size = cos.shape[-1]
    out = torch.empty_like(t, memory_format=torch.contiguous_format)
    halves, turned = t[..., :size].chunk(2, -1), out[..., :size].chunk(2, -1)
    for here, there, target, factor, mixed in zip(halves, halves[::-1], turned, cos.chunk(2, -1), across):
        torch.mul(here, factor, out=target)
        target.addcmul_(there, mixed)
    out[..., size:] = t[..., size:]
    return out


def install() -> None:
    """Let megatron-core's attention use it for the layouts it knows."""
    from megatron.core.models.common.embeddings import rope_utils

    original: Callable[..., Tensor] = rope_utils._apply_rotary_pos_emb_bshd

    def apply(t: Tensor, freqs: Tensor, rotary_interleaved: bool = False, *more: Any, **options: Any) -> Tensor:
        if rotary_interleaved or any(more) or options.get("multi_latent_attention") or freqs.requires_grad:
            return original(t, freqs, rotary_interleaved, *more, **options)
        scale = options.get("mscale", 1.0)
        cos, sin = ((part * scale).to(t.dtype) for part in (freqs.cos(), freqs.sin()))
        turned: Tensor = Rotation.apply(t, cos, sin)
        return turned

    rope_utils._apply_rotary_pos_emb_bshd = apply
