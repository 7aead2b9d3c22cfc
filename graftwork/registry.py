"""A registry: the things of one kind (methods, families, recipes, executors) by name."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from graftwork.errors import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Named things of one kind, in the order in which they were entered.

    ``kind`` says in words what they are. Whatever lists them (command line, docs tables, contract tests) reads the
    registry, so that a new thing is one file and one entry.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def enter(self, name: str, entry: T) -> T:
        """Enter ``entry`` under ``name`` and return it; raises ConfigError when the name is taken."""
        if name in self._entries:
            raise ConfigError(f"there is a {self.kind} {name!r} already; choose another name.")
        self._entries[name] = entry
        return entry

    def withdraw(self, name: str) -> None:
        """Take ``name`` out again; unknown names are ignored."""
        self._entries.pop(name, None)

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
