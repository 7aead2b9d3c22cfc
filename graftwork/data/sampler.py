"""Which rows make up which global batch; never a function of the number of data-parallel ranks."""

import math
from collections.abc import Mapping
from typing import Optional

import numpy
from pydantic import BaseModel, Field

from graftwork.errors import DataError
from graftwork.jsonfile import validated

FILL = -1
"""Stands for a row that is ignored altogether."""


class _Position(BaseModel):
    """A state; ``size`` and ``seed`` are left out where others were asked for."""

    consumed_samples: int = Field(strict=True, ge=0, le=2**60)
    size: Optional[int] = Field(None, strict=True)
    seed: Optional[int] = Field(None, strict=True)


def check_position(state: object) -> None:
    """Raise DataError unless ``state`` is what ``RowStream.state_dict`` gives: it may come from a file of others."""
    validated(state, _Position, "the position in the training data", DataError)


class RowStream:
    """Endless shuffled passes over ``size`` rows, cut into full global batches.

    Pass e has an order of its own that depends on (seed, e) only; the first batch of a pass may begin inside the last
    batch of the one before, so every step has the same number of rows and none is left out. ``consumed_samples`` is
    the whole state.
    """

    def __init__(self, size: int, global_batch_size: int, seed: int, overfit: bool = False) -> None:
        self.size = size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.overfit = overfit
        self.consumed_samples = 0
        self._order: tuple[int, numpy.ndarray] = (-1, numpy.empty(0, dtype=numpy.int64))

    def __len__(self) -> int:
        """Steps that show every row at least once."""
        return math.ceil(self.size / self.global_batch_size)

    def batch(self, start: int) -> list[int]:
        """The rows of the global batch that begins at sample ``start`` of the stream."""
        return [self._row(sample) for sample in range(start, start + self.global_batch_size)]

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, and of what."""
        return {"consumed_samples": self.consumed_samples, "size": self.size, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken; raises DataError when it says that it was on other data or another seed."""
        check_position(state)
        names = {"size": "number of training rows (packed ones when packing)", "seed": "data seed"}
        for key, name in names.items():
            if state.get(key, getattr(self, key)) != getattr(self, key):
                raise DataError(
                    f"the {name} was {state[key]} when the training state was saved, now it is {getattr(self, key)}; "
                    "resume with the same data settings, or start anew."
                )
        self.consumed_samples = int(state["consumed_samples"])

    def _row(self, sample: int) -> int:
        if self.overfit:
            return sample % self.size
        wanted = sample // self.size
        if self._order[0] != wanted:
            self._order = (wanted, shuffled(self.size, self.seed, wanted))
        return int(self._order[1][sample % self.size])


def shuffled(size: int, seed: int, epoch: int) -> numpy.ndarray:
    """The order of rows in pass ``epoch``, int64 [size]."""
    # Sorting raw generator words: unlike permutation(), their stream is fixed for all NumPy versions.
    return numpy.argsort(numpy.random.PCG64([seed, epoch]).random_raw(size), kind="stable")


def in_order(size: int, global_batch_size: int, step: int) -> list[list[int]]:
    """Rows 0..size-1 in order, each once; the last batch is filled up to a multiple of ``step`` rows."""
    batches = [list(range(i, min(i + global_batch_size, size))) for i in range(0, size, global_batch_size)]
    if batches:
        batches[-1] += [FILL] * (-len(batches[-1]) % step)
    return batches
