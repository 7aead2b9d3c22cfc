"""Every random generator of this rank, as plain tensors and numbers."""

import random
from typing import Any, TypedDict

import numpy
import torch
from torch import Tensor

import graftwork.compat  # noqa: F401  (accommodations must precede any megatron import)

# isort: split
from megatron.core import tensor_parallel


class State(TypedDict):
    """The generators of one rank, in what ``torch.load(weights_only=True)`` reads; ``tracker``: megatron-core's."""

    python: list[Any]
    numpy: list[Any]
    torch: Tensor
    cuda: Tensor | None
    tracker: dict[str, Tensor]


def capture() -> State:
    """Return the state of Python's, NumPy's, torch's and megatron-core's generators."""
    version, internal, gauss = random.getstate()
    legacy = numpy.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)
    algorithm, keys, position, has_gauss, cached = legacy
    return {
        "python": [version, list(internal), gauss],
        "numpy": [algorithm, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def restore(state: State) -> None:
    """Put every generator back to a captured state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((algorithm, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
