"""Tensors that are not there yet: made when they are written or read, so that one at a time is in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from graftwork.errors import ArtifactError, quoted


class Readable(Protocol):
    """A tensor, or one that is still in its file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def __getitem__(self, index: slice) -> Tensor: ...


@dataclass(frozen=True)
class Lazy:
    """A tensor of a known shape, made when it is asked for; also a source to read slices from."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return list(self.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """Return a part of the tensor."""
        return self.make()[index]


class Held:
    """The tensors of one adapter by site and name, each to be taken once and with the shape that it must have.

    ``who`` is what an error calls them. Raises ArtifactError for tensors that are missing, misshapen or left over.
    """

    def __init__(self, tensors: Mapping[str, Readable], who: str) -> None:
        self._left, self._who = dict(tensors), who

    @property
    def names(self) -> list[str]:
        """The names of those that were not taken yet."""
        return list(self._left)

    def take(self, name: str, *shape: int) -> Lazy:
        """Return a tensor that has this shape."""
        if name not in self._left:
            raise ArtifactError(f"{self._who} lacks the tensor {quoted(name)}.")
        held = self._left.pop(name)
        if tuple(held.shape) != shape:
            raise ArtifactError(
                f"Tensor {quoted(name)} of {self._who} has shape {list(held.shape)}, but the model needs {list(shape)}."
            )
        return Lazy(shape, lambda: held[:])

    def finish(self) -> None:
        """Raise ArtifactError when tensors are left that nothing has asked for."""
        if self._left:
            first = min(self._left)
            raise ArtifactError(f"{self._who} holds {len(self._left)} tensors too many, e.g. {quoted(first)}.")
