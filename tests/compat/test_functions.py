"""SwiGLU and rotary positions as functions of their own: the formula's values and gradients, nothing else kept."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graftwork.core  # noqa: F401  # installs them
from graftwork.compat import gated
from graftwork.compat.gated import SwiGLU, weighted_swiglu
from graftwork.compat.rotary import Rotation


def seeded(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64).to(dtype)


def formula(joined: Tensor) -> Tensor:
    gate, up = joined.chunk(2, -1)
    return F.silu(gate) * up


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    out.backward(of)
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("rows", [None, 4, 1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_swiglu_is_its_formula(
    dtype: torch.dtype, tolerance: float, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back at once, by blocks of which the last is smaller, and row by row where one alone is too large."""
    if rows is not None:
        monkeypatch.setattr(gated, "AT_A_TIME", rows * 8 - (rows == 1))
    x, of = seeded(5, 3, 16, dtype=dtype), seeded(5, 3, 8, dtype=dtype)
    for found, wanted in zip(gradients(SwiGLU.apply, x, of), gradients(formula, x.double(), of.double()), strict=True):
        assert found.dtype == dtype and (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_swiglu_keeps_its_input_alone() -> None:
    x, kept = seeded(5, 16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SwiGLU.apply(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_weights_of_experts_are_multiplied_in() -> None:
    x, weights, bias = seeded(5, 16, dtype=torch.bfloat16), seeded(5, 1, dtype=torch.float32), None
    found = weighted_swiglu(x, bias, weights, False)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (formula(x) * weights).to(torch.bfloat16))


@pytest.mark.parametrize("turned", [8, 4])
def test_a_rotation_is_its_formula(turned: int) -> None:
    """Also where only the first half of each head is turned, and for a gradient that lies elsewhere in memory."""
    t, angles = seeded(6, 2, 3, 8), seeded(6, 1, 1, turned)
    cos, sin = angles.cos(), angles.sin()

    def plain(t: Tensor) -> Tensor:
        turning, passing = t[..., :turned], t[..., turned:]
        first, second = turning.chunk(2, -1)
        return torch.cat([turning * cos + torch.cat([-second, first], -1) * sin, passing], -1)

    of = seeded(6, 3, 2, 8).transpose(1, 2)
    ours = gradients(lambda x: Rotation.apply(x, cos, sin), t, of)
    for found, wanted in zip(ours, gradients(plain, t, of), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_megatron_core_uses_both() -> None:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import mlp

    t = seeded(6, 2, 3, 8).requires_grad_()
    assert "Rotation" in str(rope_utils._apply_rotary_pos_emb_bshd(t, seeded(6, 1, 1, 8)).grad_fn)
    assert "Rotation" not in str(rope_utils._apply_rotary_pos_emb_bshd(t, seeded(6, 1, 1, 8), True).grad_fn)
    assert torch.cuda.is_available() or "SwiGLU" in str(mlp.bias_swiglu_impl(t, None, False, False).grad_fn)
