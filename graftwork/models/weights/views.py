"""Lazy views of a tensor on disk: transposed, or a block of its rows; reading one touches only its bytes."""

from dataclasses import dataclass

from torch import Tensor

from graftwork.parallel.sharding import Source

Index = slice | tuple[slice, ...]


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


def full_index(index: Index, dimensions: int) -> tuple[slice, ...]:
    """Return ``index`` as one slice per dimension."""
    given = index if isinstance(index, tuple) else (index,)
    return (*given, *(slice(None),) * (dimensions - len(given)))
