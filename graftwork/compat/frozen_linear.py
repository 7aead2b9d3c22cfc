"""The backward of frozen linears: their biases may train, and the gradient is folded into one matrix product."""

from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight
from torch import Tensor


class FrozenLinear(LinearWithFrozenWeight):
    """megatron-core's linear with a frozen weight, with a gradient for its bias.

    megatron-core gives such a bias none, without a word. The gradient is seen as one matrix [tokens, out]: ``matmul``
    does not fold the leading dimensions of a gradient [s, b, out] with other strides than a contiguous one's (attention
    and losses give such): it copies the weight once per row, many times the cost of the product.
    """

    @staticmethod
    def backward(ctx: LinearWithFrozenWeight, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return megatron-core's gradients, computed on the folded gradient, and the bias's."""
        folded = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input, grad_weight, _, *rest = LinearWithFrozenWeight.backward(ctx, folded)
        needs: tuple[bool, ...] = ctx.needs_input_grad
        grad_bias = folded.sum(dim=0) if needs[2] else None
        return grad_input.view(*grad_output.shape[:-1], grad_input.shape[-1]), grad_weight, grad_bias, *rest


def install() -> None:
    """Let megatron-core's linears use it."""
    setattr(layers, "LinearWithFrozenWeight", FrozenLinear)  # noqa: B010  # a class: not to be assigned, says mypy
