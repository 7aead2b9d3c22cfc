"""What is asked of a model before it is built: typed requests that wait for the base weights, in order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftwork.errors import GraftworkError
from graftwork.peft import PEFT
from graftwork.peft.stack import Stack


@dataclass(frozen=True)
class Add:
    """Attach a transform, to be trained or frozen."""

    transform: PEFT
    trainable: bool = True


@dataclass(frozen=True)
class Load:
    """Attach the adapters of the artifact at ``path`` (``names`` None: all of them) with their trained values.

    ``checksum``: of the artifact that was seen when this was asked for; None where it is read at once.
    """

    path: str | Path
    names: Sequence[str] | None = None
    trainable: bool = True
    check_base: bool = True
    checksum: str | None = None


@dataclass(frozen=True)
class Freeze:
    """Stop all training."""


@dataclass(frozen=True)
class Change:
    """Do something to the adapters that are attached by then."""

    do: Callable[[Stack], None]


Request = Add | Load | Freeze | Change


class Pending:
    """The requests to one model, in the order in which they came."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    @property
    def transforms(self) -> dict[str, PEFT]:
        """The transforms that wait to be attached, by name."""
        return {asked.transform.name: asked.transform for asked in self._requests if isinstance(asked, Add)}

    def put(self, *requests: Request) -> None:
        """Let ``requests`` wait behind those that are there."""
        self._requests += requests

    def drop(self, name: str) -> bool:
        """Forget the request for the transform called ``name``; tell whether there was one."""
        kept = [asked for asked in self._requests if not (isinstance(asked, Add) and asked.transform.name == name)]
        dropped = len(kept) < len(self._requests)
        self._requests = kept
        return dropped

    def carry_out(self, do: Callable[[Request], None]) -> None:
        """Do every request in order; when one is refused, it and all after it wait on and its error is raised."""
        requests, self._requests = self._requests, []
        for done, asked in enumerate(requests):
            try:
                do(asked)
            except GraftworkError:
                self._requests = requests[done:]
                raise
