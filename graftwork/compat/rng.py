"""megatron-core's random-state tracker on the CPU generator.

megatron-core keeps one named state per purpose (data parallel, tensor parallel, expert) and swaps it into the CUDA
generator; without CUDA the default CPU generator takes that place.
"""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import random as megatron_random


class CPURNGStatesTracker(megatron_random.CudaRNGStatesTracker):
    """CudaRNGStatesTracker whose states belong to the default CPU generator."""

    _current_state_name: str

    def add(self, name: str, seed: int) -> None:
        """Track a state ``name`` that starts from ``seed``; both must be new."""
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random state {name!r} with seed {seed} repeats a tracked name or seed.")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the state ``name`` inside the block; the outer state continues afterwards as if untouched."""
        if name not in self.states_:
            raise KeyError(f"random state {name!r} is not tracked; tracked: {sorted(self.states_)}.")
        outer, outer_name = torch.get_rng_state(), self._current_state_name
        if outer_name != "default-rng":
            self.states_[outer_name] = outer
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(self.states_.get(outer_name, outer) if outer_name != "default-rng" else outer)
            self._current_state_name = outer_name


def _get_state(*_: object, **__: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(new_state)


def install() -> None:
    """Make megatron-core create and use the CPU tracker, in dropout forks and in activation recompute."""
    setattr(megatron_random, "CudaRNGStatesTracker", CPURNGStatesTracker)  # noqa: B010  (a class, replaced on purpose)
    megatron_random._get_cuda_rng_state = _get_state
    megatron_random._set_cuda_rng_state = _set_state
    megatron_random.initialize_rng_tracker(force_reset=True)
