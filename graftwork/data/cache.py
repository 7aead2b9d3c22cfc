"""Tokenised rows on disk: one memory-mapped Arrow file per key, written once, shared by processes and runs."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional, TypedDict, cast

import pyarrow
from pydantic import TypeAdapter, ValidationError

from graftwork.atomic import atomic_directory, clear_leftovers
from graftwork.cache import cache_directory, locked
from graftwork.errors import DataError, quoted
from graftwork.jsonfile import read_bytes

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 1
"""Part of every key; raise it when the same rows would be tokenised differently."""

Columns = Mapping[str, Sequence[object]]
"""A stretch of rows by column name, as long in every column."""


class Report(TypedDict, total=False):
    """What became of the rows of a file: how many were kept, cut or dropped, their tokens, and how they pack.

    ``unread`` names fields that no template reads, ``adapters`` those that rows are sent to, ``largest_id`` is the
    largest id of the vocabulary in use, ``layout`` says what rows hold.
    """

    file: str
    rows: int
    truncated: int
    dropped: int
    tokens: int
    answer_tokens: int
    longest: int
    unread: list[str]
    adapters: list[str]
    largest_id: int
    layout: str
    packed_rows: int
    packing_efficiency: float


_REPORT: TypeAdapter[dict[str, int | float | str | list[str]]] = TypeAdapter(dict[str, int | float | str | list[str]])

Produce = Callable[[Report], Iterator[Columns]]
"""Yields the rows of a table and fills in its report."""


def joined(reports: Sequence[Report]) -> Report:
    """The report of several files as of one."""
    return Report(
        rows=sum(one["rows"] for one in reports),
        truncated=sum(one["truncated"] for one in reports),
        dropped=sum(one["dropped"] for one in reports),
        tokens=sum(one["tokens"] for one in reports),
        answer_tokens=sum(one["answer_tokens"] for one in reports),
        longest=max(one["longest"] for one in reports),
        largest_id=max(one["largest_id"] for one in reports),
        adapters=sorted({name for one in reports for name in one["adapters"]}),
        unread=sorted({name for one in reports for name in one["unread"]}),
        layout=" and ".join(dict.fromkeys(one["layout"] for one in reports)),
    )


def cache_key(**parts: object) -> str:
    """Name of what ``parts`` decide: content and tokenizer fingerprints, templates, layout, lengths."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cache_root(directory: Optional[str] = None) -> Path:
    """Where token tables are kept: in ``directory``, else in the user's cache."""
    return (Path(directory).expanduser() if directory else cache_directory()) / "tokens"


def cached_table(
    root: Path, key: str, schema: pyarrow.Schema, produce: Produce, needed: frozenset[str] = frozenset()
) -> tuple["Dataset", Report]:
    """Return the memory-mapped ``datasets.Dataset`` and the report under ``key``; produce them when missing.

    Processes that want the same key wait for the first one; an interrupted one leaves nothing. An entry of an earlier
    version, whose report lacks what is ``needed``, is produced again. Raises DataError when the cache cannot be
    written or read.
    """
    from datasets import Dataset

    target = root / key
    with locked(target, _unwritable):
        clear_leftovers(root, key)
        if not target.exists() or not needed <= _report(target).keys():
            _write(target, schema, produce)
    try:
        return Dataset.from_file(str(target / "rows.arrow")), _report(target)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(target, error) from error


def _report(target: Path) -> Report:
    try:
        return cast(Report, _REPORT.validate_json(read_bytes(target / "report.json", DataError), strict=True))
    except (ValidationError, DataError) as error:
        raise _damaged(target, error) from error


def _damaged(target: Path, error: Exception) -> DataError:
    reason = quoted(str(error).splitlines()[0], bare=True).rstrip(".")
    return DataError(f"the token cache entry {str(target)!r} is damaged ({reason}); delete it.")


def _unwritable(root: Path, error: OSError) -> DataError:
    return DataError(f"the token cache {str(root)!r} cannot be written; set cache_dir to another place.")


def _write(target: Path, schema: pyarrow.Schema, produce: Produce) -> None:
    report: Report = {}
    with atomic_directory(target) as directory:
        with pyarrow.OSFile(str(directory / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, schema) as out:
            for columns in produce(report):
                out.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema=schema))
        (directory / "report.json").write_text(json.dumps(report))
