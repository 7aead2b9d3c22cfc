"""The frozen linear's backward: the same gradient, in one product, whatever the gradient's strides."""

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
