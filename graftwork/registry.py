"""A registry: the things of one kind (methods, families, recipes, executors) by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Generic, TypeVar

from graftwork.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where an entry stands that is imported once it is asked for: ``package.module`` or ``package.module:name``."""

    path: str


class Registry(Mapping[str, T], Generic[T]):
    """Named things of one kind, in the order in which they were entered.

    ``kind`` says in words what they are. Whatever lists them (command line, docs tables, contract tests) reads the
    registry, so that a new thing is one file and one entry.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T | Place] = {}

    def enter(self, name: str, entry: T) -> T:
        """Enter ``entry`` under ``name`` and return it; raises ConfigError when the name is taken."""
        self._refuse_taken(name)
        self._entries[name] = entry
        return entry

    def enter_place(self, name: str, path: str) -> None:
        """Enter what stands at ``path``, see ``Place``, unread; raises ConfigError when the name is taken."""
        self._refuse_taken(name)
        self._entries[name] = Place(path)

    def withdraw(self, name: str) -> None:
        """Take ``name`` out again; unknown names are ignored."""
        self._entries.pop(name, None)

    def __getitem__(self, name: str) -> T:
        entry = self._entries[name]
        if isinstance(entry, Place):
            entry = self._entries[name] = resolve_name(entry.path)
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _refuse_taken(self, name: str) -> None:
        if name in self._entries:
            raise ConfigError(f"there is a {self.kind} {name!r} already; choose another name.")
