"""What an adapter trains, told without its values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outline:
    """What adapter ``name`` has on this rank: the modules it stands at, full tensors' shapes by artifact key.

    ``derived`` are the keys of tensors that follow from trained ones and are saved beside them.
    """

    name: str
    sites: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    derived: Sequence[str]

    @property
    def keys(self) -> list[str]:
        """The keys of all its tensors in an artifact."""
        return [*self.shapes, *self.derived]
