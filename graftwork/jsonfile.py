"""JSON and file names that others wrote: read once, within limits, refused in one sentence."""

import json
import math
import os
import stat
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from graftwork.errors import GraftworkError, quoted

MAX_BYTES = 32 * 2**20
"""Largest file that is read: the index of a model with a hundred thousand tensors has a third of it."""
MAX_DEPTH = 64
"""Deepest nesting of objects and lists."""
MAX_NAME = 255
"""Longest file name, in bytes, that every file system takes."""

M = TypeVar("M", bound=BaseModel)


def read_json(path: Path, error: type[GraftworkError], limit: int = MAX_BYTES) -> object:
    """Return the JSON value of a regular file of at most ``limit`` bytes; raises ``error`` in one sentence.

    What Python's parser lets pass is refused too: a key given twice, numbers that are not finite, deep nesting.
    """
    return parse_json(read_bytes(path, error, limit), repr(str(path)), error)


def read_object(path: Path, error: type[GraftworkError], limit: int = MAX_BYTES) -> dict[str, object]:
    """Return the JSON object of a file, as ``read_json`` does; raises ``error`` for any other value."""
    value = read_json(path, error, limit)
    if not isinstance(value, dict):
        raise error(f"{str(path)!r} is not a JSON object.")
    return value


def read_schema(path: Path, schema: type[M], error: type[GraftworkError], limit: int = MAX_BYTES) -> M:
    """Return the JSON value of a file as a ``schema``; raises ``error`` naming the first field that does not fit."""
    return validated(read_json(path, error, limit), schema, repr(str(path)), error)


def read_bytes(path: Path, error: type[GraftworkError], limit: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file; raises ``error`` when it is too large, absent, a device or a pipe."""
    try:
        # A pipe would block until somebody writes to it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as handle:
            if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
                raise error(f"{quoted(path)} is not a regular file.")
            data = handle.read(limit + 1)
    except (OSError, ValueError) as problem:
        raise error(f"{quoted(path)} cannot be read: {_reason(problem)}.") from problem
    if len(data) > limit:
        raise error(f"{quoted(path)} is larger than {limit:,} bytes.")
    return data


def parse_json(data: bytes, what: str, error: type[GraftworkError]) -> object:
    """Return the JSON value of ``data``, which an error calls ``what``; see ``read_json``."""
    try:
        text = data.decode("utf-8")
        value: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_finite, parse_float=_finite)
    except RecursionError as problem:
        raise error(f"{what} is nested deeper than {MAX_DEPTH} levels.") from problem
    except ValueError as problem:  # also what is no UTF-8, and whole numbers of thousands of digits
        raise error(f"{what} is not valid JSON: {_reason(problem)}.") from problem
    if deeper(value):
        raise error(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    return value


def validated(value: object, schema: type[M], what: str, error: type[GraftworkError]) -> M:
    """Return ``value`` as a ``schema``; raises ``error`` naming ``what`` and the first field that does not fit."""
    try:
        return schema.model_validate(value)
    except ValidationError as problem:
        first, count = problem.errors(include_url=False)[0], problem.error_count()
        place = quoted(".".join(map(str, first["loc"]))) + ": " if first["loc"] else ""
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise error(f"{what} does not fit: {place}{quoted(first['msg'], bare=True)}{more}.") from problem


def named_inside(directory: Path, name: object, what: str, error: type[GraftworkError]) -> Path:
    """Return the file ``name`` of ``directory``, where ``what`` names it; raises ``error`` for any other place.

    A valid name has no directory part; a symbolic link must not lead outside, see ``refuse_outside``.
    """
    if not isinstance(name, str) or not _plain(name):
        raise error(f"{what} names the file {quoted(name)}; a plain name of a file in its directory is valid.")
    refuse_outside(directory, directory / name, error)
    return directory / name


def refuse_outside(directory: Path, file: Path, error: type[GraftworkError]) -> None:
    """Raise ``error`` when ``file`` is a link that leads out of ``directory`` (the hub's cache lies beside its own)."""
    try:
        home, place = directory.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as problem:  # a loop of links
        raise error(f"{quoted(file)} cannot be read: {_reason(problem)}.") from problem
    # The hub's cache: snapshots/<revision>/<file> are links to blobs/<hash>.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (place.is_relative_to(home) or place.is_relative_to(blobs)):
        raise error(f"{quoted(file)} is a link that leads out of its directory; put the file itself there.")


def deeper(value: object, levels: int = MAX_DEPTH) -> bool:
    """Tell whether dictionaries, lists and tuples are nested deeper than ``levels``."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if inner is None:
        return False
    return levels == 0 or any(deeper(one, levels - 1) for one in inner)


def _plain(name: str) -> bool:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return length <= MAX_NAME and name not in ("", ".", "..") and not set("/\\\0") & set(name)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {quoted(name)} is given twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{quoted(text)} is no finite number")


def _reason(problem: Exception) -> str:
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return quoted(text, bare=True).rstrip(".")
