"""Routes: which adapters act on which rows of a batch, or on which tokens of a packed one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftwork.ways import Way


@dataclass(frozen=True)
class Routes:
    """The way of every row, or of every token: ``chosen`` int64 [b, n] indexes ``ways``; n is 1 for whole rows.

    [1, 1] is the way of all rows, however many there are.
    """

    ways: tuple[Way, ...]
    chosen: Tensor

    @classmethod
    def of_rows(cls, rows: Iterable[Way], device: torch.device | str = "cpu") -> "Routes":
        """Return routes [b, 1] of whole rows."""
        given = list(rows)
        ways = tuple(dict.fromkeys(given))
        return cls(ways, torch.tensor([[ways.index(one)] for one in given], dtype=torch.int64, device=device))

    @property
    def names(self) -> frozenset[str]:
        """Every adapter that a way names."""
        return frozenset(name for one in self.ways for name in one or ())

    def acts(self, adapter: str) -> Tensor:
        """Return where the adapter of this name acts, bool [b, n]."""
        taken = [one is None or adapter in one for one in self.ways]
        return torch.tensor(taken, device=self.chosen.device)[self.chosen]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Routes":
        """Return the routes after ``change`` of the tensor that chooses them."""
        return replace(self, chosen=change(self.chosen))

    def in_one_line(self, length: int) -> "Routes":
        """Return the routes [1, b * length] of rows of ``length`` tokens that lie in one line."""
        return self.each(lambda chosen: chosen.expand(-1, length).reshape(1, -1))

    def at(self, positions: Tensor, rows: int, length: int) -> "Routes":
        """Return the routes [1, n] of some positions, flat indices in ``rows`` of ``length`` tokens."""
        return self.each(lambda chosen: chosen.expand(rows, length).reshape(1, -1).index_select(1, positions))
