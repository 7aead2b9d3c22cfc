"""A recipe file as plain data: YAML, JSON or TOML, read once and within limits."""

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from graftwork.errors import ConfigError, quoted
from graftwork.jsonfile import MAX_DEPTH, parse_json, read_bytes

MAX_BYTES = 2**20
"""Largest recipe file."""

MOST_VALUES = 1000
"""Most values of a recipe file: NeMo Run takes long over many."""


def read_document(path: Path) -> dict[object, object]:
    """Return the mapping of a recipe file; raises ConfigError when it is damaged, too large or no mapping."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{quoted(path)} is no recipe file; valid: one that ends in {', '.join(READERS)}.")
    data = read_bytes(path, ConfigError, MAX_BYTES)
    try:
        document = reader(data, repr(str(path)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{quoted(path)} cannot be read: {quoted(' '.join(str(error).split()), bare=True)}."
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{quoted(path)} holds no recipe; a mapping of fields is valid.")
    return document


def places(document: object, path: Path) -> Iterator[tuple[str, object, object]]:
    """Yield (where, key, value) of every place of a document; the key is None inside a list.

    Raises ConfigError for one that is nested too deep or holds too many values.
    """
    for number, place in enumerate(_walk(document, "", MAX_DEPTH, path)):
        if number == MOST_VALUES:
            raise _too_many(quoted(path))
        yield place


def _too_many(what: str) -> ConfigError:
    return ConfigError(f"{what} holds more than {MOST_VALUES:,} values; no recipe has so many.")


def _read_yaml(data: bytes, what: str) -> object:
    text = data.decode("utf-8")
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if number > 4 * MOST_VALUES:  # a key and a value, or a list's begin and end
            raise _too_many(what)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{what} is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"{what} has an alias (*{quoted(event.anchor, bare=True)}); write the value where it is used."
            )
    value: object = yaml.load(text, Loader=UniqueKeys)
    return value


def _read_toml(data: bytes, what: str) -> object:
    return tomllib.loads(data.decode("utf-8"))


def _read_json(data: bytes, what: str) -> object:
    return parse_json(data, what, ConfigError)


READERS: dict[str, Callable[[bytes, str], object]] = {
    ".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json, ".toml": _read_toml,
}  # fmt: skip


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML says it is an error, PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Return the mapping of a node."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ConfigError(f"the key {quoted(twice[0])} is given twice.")
        made: dict[object, object] = super().construct_mapping(node, deep=deep)
        return made


def _walk(value: object, where: str, levels: int, path: Path) -> Iterator[tuple[str, object, object]]:
    """Yield (where, key, value) of every place of a document; the key is None inside a list."""
    if levels == 0:
        raise ConfigError(f"{quoted(path)} is nested deeper than {MAX_DEPTH} levels.")
    items = (
        value.items() if isinstance(value, dict) else ((None, one) for one in value) if isinstance(value, list) else ()
    )
    for key, inner in items:
        place = f"{where}.{key}".strip(".") if key is not None else where
        yield place, key, inner
        yield from _walk(inner, place, levels - 1, path)
