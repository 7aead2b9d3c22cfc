"""Norms and the fused norm+linear: the formula, zero-centered gamma, flags, and what adapters read."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from graftwork import parallel
from graftwork.core.layers import LayerNormColumnParallelLinear, TorchNorm, normalized_input
from tests.helpers import tiny_gpt


@pytest.fixture(autouse=True)
def world():
    parallel.ensure_initialized()
    yield
    parallel.destroy()


def by_hand(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, rms: bool) -> torch.Tensor:
    centered = x if rms else x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma + (0 if beta is None else beta)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norm_equals_the_formula(normalization: str, zero_centered: bool) -> None:
    cfg = tiny_gpt.config(normalization=normalization, layernorm_zero_centered_gamma=zero_centered)
    norm, rms = TorchNorm(cfg, 64, eps=1e-5), normalization == "RMSNorm"
    x = torch.randn(3, 2, 64)
    start = norm(x)
    torch.nn.init.normal_(norm.weight)
    gamma = norm.weight + 1 if zero_centered else norm.weight
    torch.testing.assert_close(norm(x), by_hand(x, gamma, norm.bias, rms), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        start, by_hand(x, torch.ones(64), None, normalization == "RMSNorm"), atol=1e-5, rtol=1e-4
    )
    assert (norm.bias is None) == rms


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_fused_linear_multiplies_its_normalized_input(normalization: str) -> None:
    linear = _fused(normalization, zero_centered=True)
    x = torch.randn(3, 2, 64)
    seen = normalized_input(linear, x)
    out, bias = linear(x)
    torch.testing.assert_close(out, F.linear(seen, linear.weight), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        seen,
        by_hand(x, linear.layer_norm_weight + 1, linear.layer_norm_bias, normalization == "RMSNorm"),
        atol=1e-5,
        rtol=1e-4,
    )
    assert bias is not None
    assert not torch.allclose(seen, x)


def test_parameter_names_are_transformer_engines() -> None:
    assert {n for n, _ in _fused("LayerNorm").named_parameters()} == {
        "weight",
        "bias",
        "layer_norm_weight",
        "layer_norm_bias",
    }
    assert "layer_norm_bias" not in dict(_fused("RMSNorm").named_parameters())


def test_plain_linears_see_their_input() -> None:
    x = torch.randn(2, 64)
    assert normalized_input(torch.nn.Linear(64, 8), x) is x


def test_transformer_engines_attributes_are_enough() -> None:
    """transformer-engine's fused linear has eps, zero_centered_gamma, normalization; RMSNorm has no bias attribute."""
    engine = SimpleNamespace(
        layer_norm_weight=torch.randn(64), eps=1e-5, zero_centered_gamma=False, normalization="RMSNorm"
    )
    x = torch.randn(2, 64)
    seen = normalized_input(engine, x)  # type: ignore[arg-type]
    torch.testing.assert_close(seen, by_hand(x, engine.layer_norm_weight, None, True), atol=1e-5, rtol=1e-4)


def _fused(normalization: str, zero_centered: bool = False) -> LayerNormColumnParallelLinear:
    cfg = tiny_gpt.config(normalization=normalization, layernorm_zero_centered_gamma=zero_centered)
    linear = LayerNormColumnParallelLinear(
        64, 32, config=cfg, init_method=torch.nn.init.normal_, bias=True, skip_bias_add=True
    )
    torch.nn.init.normal_(linear.layer_norm_weight)
    return linear
