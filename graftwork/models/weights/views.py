"""Lazy views of a tensor on disk: transposed, some rows, part of a stack; reading one touches only its bytes."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from graftwork.parallel.sharding import Source

Index = slice | tuple[slice, ...]


class Stored(Source, Protocol):
    """A tensor in its file, nothing read yet."""

    def get_dtype(self) -> str:
        """Number format as safetensors names it: ``F32``, ``BF16``."""
        ...


@dataclass(frozen=True)
class PartOfStack:
    """Rows ``start`` to ``stop`` of matrix ``index`` in a stack [matrices, rows, columns]."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class TransposedView:
    """A matrix seen with its two dimensions swapped."""

    source: Source

    def get_shape(self) -> list[int]:
        """Shape as seen through the view."""
        return list(reversed(self.source.get_shape()))

    def __getitem__(self, index: Index) -> Tensor:
        """Read ``index`` (slices of the swapped dimensions)."""
        rows, columns = full_index(index, 2)
        return self.source[columns, rows].T


@dataclass(frozen=True)
class RowsView:
    """Rows ``start`` to ``stop`` of a tensor."""

    source: Source
    start: int
    stop: int

    def get_shape(self) -> list[int]:
        """Shape as seen through the view."""
        return [self.stop - self.start, *self.source.get_shape()[1:]]

    def __getitem__(self, index: Index) -> Tensor:
        """Read ``index``, whose first slice counts from the view's first row."""
        rows, *rest = full_index(index, len(self.get_shape()))
        start, stop, _ = rows.indices(self.stop - self.start)
        return self.source[(slice(self.start + start, self.start + stop), *rest)]


@dataclass(frozen=True)
class PartView:
    """A part of a stack of matrices, seen as a matrix."""

    source: Stored
    part: PartOfStack

    def get_shape(self) -> list[int]:
        """Shape as seen through the view."""
        return [self.part.stop - self.part.start, self.source.get_shape()[2]]

    def get_dtype(self) -> str:
        """Number format as safetensors names it."""
        return self.source.get_dtype()

    def __getitem__(self, index: Index) -> Tensor:
        """Read ``index``, whose first slice counts from the part's first row."""
        rows, columns = full_index(index, 2)
        start, stop, _ = rows.indices(self.part.stop - self.part.start)
        one, first = self.part.index, self.part.start
        return self.source[slice(one, one + 1), slice(first + start, first + stop), columns][0]


def full_index(index: Index, dimensions: int) -> tuple[slice, ...]:
    """Return ``index`` as one slice per dimension."""
    given = index if isinstance(index, tuple) else (index,)
    return (*given, *(slice(None),) * (dimensions - len(given)))
