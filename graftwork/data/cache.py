"""Tokenised rows on disk: one memory-mapped Arrow file per key, written once, shared by processes and runs."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional, TypedDict

import pyarrow

from graftwork.atomic import atomic_directory
from graftwork.cache import cache_directory, locked
from graftwork.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 1
"""Part of every key; raise it when the same rows would be tokenised differently."""

Columns = Mapping[str, Sequence[object]]
"""A stretch of rows by column name, as long in every column."""


class Report(TypedDict, total=False):
    """What became of the rows of a file: how many were kept, cut or dropped, their tokens, and how they pack."""

    file: str
    rows: int
    truncated: int
    dropped: int
    tokens: int
    answer_tokens: int
    longest: int
    packed_rows: int
    packing_efficiency: float


Produce = Callable[[Report], Iterator[Columns]]
"""Yields the rows of a table and fills in its report."""


def cache_key(**parts: object) -> str:
    """Name of what ``parts`` decide: content and tokenizer fingerprints, templates, layout, lengths."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cache_root(directory: Optional[str] = None) -> Path:
    """Where token tables are kept: in ``directory``, else in the user's cache."""
    return (Path(directory).expanduser() if directory else cache_directory()) / "tokens"


def cached_table(root: Path, key: str, schema: pyarrow.Schema, produce: Produce) -> tuple["Dataset", Report]:
    """Return the memory-mapped ``datasets.Dataset`` and the report under ``key``; produce them when missing.

    Processes that want the same key wait for the first one; an interrupted one leaves nothing. Raises DataError
    when the cache cannot be written or read.
    """
    from datasets import Dataset

    target = root / key
    with locked(target, _unwritable):
        if not target.exists():
            _write(target, schema, produce)
    try:
        return Dataset.from_file(str(target / "rows.arrow")), json.loads((target / "report.json").read_text())
    except (pyarrow.ArrowInvalid, FileNotFoundError, json.JSONDecodeError) as error:
        raise DataError(f"the token cache entry {str(target)!r} is damaged ({error}); delete it.") from error


def _unwritable(root: Path, error: OSError) -> DataError:
    return DataError(f"the token cache {str(root)!r} cannot be written; set cache_dir to another place.")


def _write(target: Path, schema: pyarrow.Schema, produce: Produce) -> None:
    report: Report = {}
    with atomic_directory(target) as directory:
        with pyarrow.OSFile(str(directory / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, schema) as out:
            for columns in produce(report):
                out.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema=schema))
        (directory / "report.json").write_text(json.dumps(report))
