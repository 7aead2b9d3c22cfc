"""A recipe as plain data, and back: mappings, lists and values that a file can hold."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fiddle as fdl
import nemo_run as run

from graftwork.errors import ConfigError, quoted, suggest
from graftwork.recipes.allowed import target
from graftwork.recipes.show import TOLD, callable_name

TARGET, PARTIAL, SAME, TUPLE, NAME = "_target_", "_partial_", "_same_as_", "_tuple_", "_name_"
"""Keys of a mapping that is no plain mapping: a configured part, one that waits for more arguments, one that stands
elsewhere too, a tuple, a function or class that is a value."""


class Writer:
    """Turns a recipe into plain data, and remembers where each part stands: one that is shared stays shared."""

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}

    def plain(self, where: str, value: object) -> object:
        """Return ``value`` of the field ``where`` as YAML can hold it."""
        if isinstance(value, fdl.Buildable):
            return self._part(where, value)
        if isinstance(value, tuple):
            return {TUPLE: self._items(where, value)}
        if isinstance(value, list):
            return self._items(where, value)
        if isinstance(value, dict):
            return {self._key(where, key): self.plain(f"{where}.{key}", one) for key, one in value.items()}
        if value is None or type(value) in (bool, int, float, str):
            return value
        if callable(value) and hasattr(value, "__qualname__"):
            return {NAME: callable_name(value)}
        raise ConfigError(f"{where}={quoted(value)} is no plain value and cannot be written to a file.")

    def _part(self, where: str, value: fdl.Buildable) -> dict[str, object]:
        if id(value) in self._seen:
            return {SAME: self._seen[id(value)]}
        self._seen[id(value)] = where
        marks: dict[str, object] = {TARGET: callable_name(value.__fn_or_cls__)}
        if where and isinstance(value, fdl.Partial):
            marks[PARTIAL] = True
        given = {name: one for name, one in value.__arguments__.items() if name not in TOLD}
        return {**marks, **{name: self.plain(f"{where}.{name}".lstrip("."), one) for name, one in given.items()}}

    def _items(self, where: str, values: list[Any] | tuple[Any, ...]) -> list[object]:
        return [self.plain(f"{where}[{number}]", one) for number, one in enumerate(values)]

    def _key(self, where: str, key: object) -> str:
        if not isinstance(key, str) or key in (TARGET, PARTIAL, SAME, TUPLE, NAME):
            raise ConfigError(f"{where} has the key {quoted(key)}, which cannot be written to a file.")
        return key


class Reader:
    """Turns plain data back into a recipe; ``source`` says in errors where the data came from."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._parts: dict[str, fdl.Buildable] = {}

    def recipe(self, document: Mapping[object, object]) -> run.Partial:
        """Return the recipe of a whole document."""
        found = self._part("", {**document, PARTIAL: True})
        assert isinstance(found, run.Partial)
        return found

    def _value(self, where: str, value: object) -> object:
        if isinstance(value, list):
            return [self._value(f"{where}[{number}]", one) for number, one in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if TARGET in value:
            return self._part(where, value)
        for mark, read in self._marks().items():
            if mark in value:
                return read(where, value[mark])
        return {key: self._value(f"{where}.{key}", one) for key, one in value.items()}

    def _marks(self) -> dict[str, Callable[[str, object], object]]:
        return {SAME: self._same, TUPLE: self._tuple, NAME: lambda where, name: self._named(where, name)}

    def _part(self, where: str, value: Mapping[object, object]) -> fdl.Buildable:
        made = self._named(where, value[TARGET])
        kind = run.Partial if value.get(PARTIAL) is True else run.Config
        part: fdl.Buildable = kind(made)
        self._parts[where] = part
        for name, one in self._fields(where, value):
            inner = self._value(f"{where}.{name}".lstrip("."), one)
            try:
                setattr(part, name, inner)
            except (AttributeError, TypeError) as error:
                valid = part.__signature_info__.parameters
                raise self._error(
                    where, f"{callable_name(made)} has no field {name!r}; {suggest(name, valid)}"
                ) from error
        return part

    def _fields(self, where: str, value: Mapping[object, object]) -> Iterator[tuple[str, object]]:
        for name, one in value.items():
            if name in (TARGET, PARTIAL):
                continue
            if not isinstance(name, str) or not name.isidentifier():
                raise self._error(where, f"{quoted(name)} is no name of a field.")
            yield name, one

    def _named(self, where: str, name: object) -> Callable[..., object]:
        try:
            return target(str(name))
        except ConfigError as error:
            raise self._error(where, str(error)) from error

    def _same(self, where: str, other: object) -> fdl.Buildable:
        if other not in self._parts:
            raise self._error(where, f"{SAME} {quoted(other)} is no part that stands above it.")
        return self._parts[str(other)]

    def _tuple(self, where: str, items: object) -> tuple[object, ...]:
        if not isinstance(items, list):
            raise self._error(where, f"{TUPLE} holds {quoted(items)}; a list is valid.")
        return tuple(self._value(f"{where}[{number}]", one) for number, one in enumerate(items))

    def _error(self, where: str, reason: str) -> ConfigError:
        return ConfigError(f"{quoted(self._source)}{', ' + where if where else ''}: {reason}")
