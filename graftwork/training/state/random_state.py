"""Every random generator of this rank, as plain tensors and numbers."""

import random
from pathlib import Path
from typing import Any, TypedDict

import numpy
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

import graftwork.compat  # noqa: F401  (accommodations must precede any megatron import)

# isort: split
from megatron.core import tensor_parallel

from graftwork.errors import quoted
from graftwork.jsonfile import validated
from graftwork.parallel.tensor_index import DamagedError
from graftwork.parallel.torch_file import read_torch

CUDA_BYTES = 16
"""Seed and offset: the state of a generator on a GPU."""


class State(TypedDict):
    """The generators of one rank, in what ``torch.load(weights_only=True)`` reads; ``tracker``: megatron-core's."""

    python: list[Any]
    numpy: list[Any]
    torch: Tensor
    cuda: Tensor | None
    tracker: dict[str, Tensor]


class _Saved(BaseModel):
    """``State`` as a file may hold it."""

    model_config = ConfigDict(arbitrary_types_allowed=True, strict=True)
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


def read(path: Path) -> State:
    """Return what a file holds once generators of its own have taken it; raises DamagedError."""
    saved = validated(read_torch(path, DamagedError), _Saved, path.name, DamagedError)
    state: State = {
        "python": saved.python,
        "numpy": saved.numpy,
        "torch": saved.torch,
        "cuda": saved.cuda,
        "tracker": saved.tracker,
    }
    try:
        random.Random().setstate(_python(state))
        numpy.random.RandomState().set_state(_numpy(state))
        for one in (state["torch"], *state["tracker"].values(), *filter(torch.is_tensor, [state["cuda"]])):
            _try(one)
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError) as problem:
        raise DamagedError(f"{quoted(path.name)} holds no state of the random generators") from problem
    return state


def restore(state: State) -> None:
    """Put every generator back to a captured state."""
    random.setstate(_python(state))
    numpy.random.set_state(_numpy(state))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), **state["tracker"]})


def _python(state: State) -> tuple[Any, ...]:
    version, internal, gauss = state["python"]
    return version, tuple(internal), gauss


def _numpy(state: State) -> tuple[Any, ...]:
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    return algorithm, keys.numpy().astype("uint32"), position, has_gauss, cached


def _try(state: Tensor) -> None:
    """Raise what torch raises for a state that no generator takes; one of a GPU is any seed and offset."""
    if state.dtype != torch.uint8 or state.numel() != CUDA_BYTES:
        torch.Generator().set_state(state)
