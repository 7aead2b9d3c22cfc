"""A stand-in for the name ``torch`` inside megatron-core modules: the same module, with CUDA requests landing on CPU.

Only names that differ are defined; everything else is read from the real ``torch`` at the time of use, so global
torch is never changed and later changes to it are seen.
"""

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randint",
    "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip


class Stream:
    """A CUDA stream or event with nothing to wait for: CPU kernels have finished when they return."""

    device = CPU

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _nothing(self, *_: object) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, *_: object) -> "Stream":
        """Return an event that has happened."""
        return self

    def query(self) -> bool:
        """Say that all work is done."""
        return True

    def elapsed_time(self, *_: object) -> float:
        """Return no time: nothing is measured."""
        return 0.0


class StandIn(types.ModuleType):
    """A module that answers from ``overrides`` and otherwise from ``real``."""

    def __init__(self, real: types.ModuleType, overrides: dict[str, Any]) -> None:
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(overrides)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _redirect(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_cpu


def _cuda() -> StandIn:
    def nothing(*_: object, **__: object) -> None:
        return None

    def no_context(*_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    stream = Stream()
    overrides = {
        "current_device": lambda: CPU,
        "synchronize": nothing,
        "empty_cache": nothing,
        "set_device": nothing,
        "Stream": Stream,
        "Event": Stream,
        "current_stream": lambda *_, **__: stream,
        "default_stream": lambda *_, **__: stream,
        "stream": no_context,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "is_current_stream_capturing": lambda: False,
        "nvtx": types.SimpleNamespace(range_push=nothing, range_pop=nothing, range=no_context),
    }
    return StandIn(torch.cuda, overrides)


@functools.cache
def stand_in() -> StandIn:
    """Return the one stand-in for ``torch``."""
    return StandIn(torch, {"cuda": _cuda()} | {name: _redirect(getattr(torch, name)) for name in FACTORIES})
