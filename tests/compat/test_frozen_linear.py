"""The frozen linear's backward: the same gradient, in one product, whatever its strides, and its bias's."""

import pytest
import torch

import graftwork.compat  # noqa: F401
from graftwork import parallel

STRIDES = {
    "contiguous": lambda g: g,
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda g: g[:, :1].expand_as(g),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_gradient_is_the_dense_one_and_needs_no_batched_product(strides):
    from megatron.core.tensor_parallel import layers

    parallel.ensure_initialized()
    x = torch.randn(5, 3, 8, requires_grad=True)
    weight = torch.randn(16, 8)
    output = layers.LinearWithFrozenWeight.apply(x, weight, None, False, None)
    gradient = STRIDES[strides](torch.randn(5, 3, 16))
    with torch.profiler.profile() as profile:
        output.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ weight)
    names = {event.key for event in profile.key_averages()}
    assert "aten::mm" in names and "aten::bmm" not in names


class Biased(torch.nn.Module):
    """A plain column-parallel linear that adds its bias itself, as T5's queries and an output layer do."""

    def __init__(self, config):
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        super().__init__()
        self.linear = ColumnParallelLinear(
            8, 16, config=config, init_method=torch.nn.init.normal_, bias=True, skip_bias_add=False
        )

    def forward(self, x):
        return self.linear(x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_trains_beside_a_frozen_weight(dtype):
    """megatron-core gives it no gradient, without a word."""
    from tests.helpers import tiny_gpt

    parallel.ensure_initialized()
    module = Biased(tiny_gpt.config(params_dtype=dtype))
    module.linear.weight.requires_grad_(False)
    x, gradient = torch.randn(5, 3, 8, dtype=dtype, requires_grad=True), torch.randn(5, 3, 16, dtype=dtype)
    module(x).backward(gradient)
    wanted = gradient.float().sum((0, 1))
    torch.testing.assert_close(
        module.linear.bias.grad.float(), wanted, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-5
    )
    assert module.linear.weight.grad is None
    torch.testing.assert_close(x.grad, gradient @ module.linear.weight)
    module.linear.bias.requires_grad_(False).grad = None
    module(x).backward(gradient)
    assert module.linear.bias.grad is None
