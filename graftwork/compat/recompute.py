"""Recomputation sees the context variables of its first run: a microbatch's own, whichever one is at work by then.

Under an interleaved schedule the layers of one microbatch are run again while another microbatch is under way, on a GPU
even in a thread of autograd's own. What a layer reads beside its tensors must be what it read the first time.
"""

import contextvars
from collections.abc import Callable

from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


def install() -> None:
    """Make megatron-core's ``checkpoint`` keep the context variables for the second run."""
    from megatron.core import tensor_parallel

    original: Callable[..., Outputs] = tensor_parallel.checkpoint

    def checkpoint(function: Callable[..., Outputs], distribute: bool, *args: object) -> Outputs:
        first = contextvars.copy_context()

        def run(*again: object) -> Outputs:
            return first.copy().run(function, *again)

        return original(run, distribute, *args)

    tensor_parallel.checkpoint = checkpoint
