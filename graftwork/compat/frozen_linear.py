"""A faster backward of frozen linears on CPU: fold the gradient into one matrix product."""

from typing import Any

from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight
from torch import Tensor


class FoldedFrozenLinear(LinearWithFrozenWeight):
    """megatron-core's frozen linear whose backward gets a contiguous gradient.

    For a gradient [s, b, out] with other strides (attention gives one) ``matmul`` does not fold the leading
    dimensions: it copies the weight once per batch row, four times the cost of the product itself on CPU.
    """

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        """Return megatron-core's gradients for the same values in contiguous memory."""
        return LinearWithFrozenWeight.backward(ctx, grad_output.contiguous())
