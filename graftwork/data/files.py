"""Read rows from JSONL, CSV and Parquet files, one at a time, each with its place in the file."""

import codecs
import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, AnyStr

import pyarrow
import pyarrow.parquet

from graftwork.cache import sha256
from graftwork.data.schema import HALF_PAIR, Place, is_text
from graftwork.errors import DataError, quoted, suggest
from graftwork.jsonfile import MAX_BYTES, parse_json

MAX_LINE = MAX_BYTES
"""Longest line, in bytes or characters."""

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Rows = Iterator[tuple[Place, object]]


def check_file(path: str) -> None:
    """Raise DataError unless ``path`` is a readable file of a known kind."""
    file = Path(path)
    with _disk_errors(path):
        if not file.is_file():
            beside = [p.name for p in file.parent.iterdir() if p.suffix in READERS] if file.parent.is_dir() else []
            where = suggest(file.name, beside) if beside else f"no data file is in {quoted(file.parent)}."
            is_there = "is no regular file" if file.exists() else "does not exist"
            raise DataError(f"data file {quoted(path)} {is_there}; {where}")
    if file.suffix not in READERS:
        valid = ", ".join(sorted(READERS))
        raise DataError(f"data file {quoted(path)} has an unknown kind {quoted(file.suffix)}; valid: {valid}.")


def read_rows(path: str) -> Rows:
    """Yield ``(place, row)`` for every row of ``path``; raises DataError when the file is broken or has no rows."""
    check_file(path)
    empty = True
    with _disk_errors(path):
        for placed in READERS[Path(path).suffix](path):
            empty = False
            yield placed
    if empty:
        raise DataError(f"data file {quoted(path)} has no rows.")


def unit(path: str) -> str:
    """What rows are numbered by in a file of this kind."""
    return "row" if Path(path).suffix == ".parquet" else "line"


def content_hash(path: str) -> str:
    """SHA-256 of the file's bytes, as hex."""
    check_file(path)
    with _disk_errors(path):
        return sha256(Path(path))


@contextmanager
def _disk_errors(path: str) -> Iterator[None]:
    """Turn what the system says of a file into a DataError; nothing else that may happen here raises OSError."""
    try:
        yield
    except OSError as error:
        reason = quoted((error.strerror or str(error)).splitlines()[0], bare=True).rstrip(".")
        raise DataError(f"data file {quoted(path)} cannot be read: {reason}.") from error


def _lines(file: IO[AnyStr], path: str) -> Iterator[AnyStr]:
    """Yield the lines of a file; raises DataError for one so long that no row can be meant."""
    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise DataError(f"{Place(path, unit(path), number)}: the line is longer than {MAX_LINE:,} characters.")
        yield line


def _read_jsonl(path: str) -> Rows:
    # Bytes, not text: an invalid byte is then reported with its line.
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), 1):
            place = Place(path, unit(path), number)
            if line.strip():
                yield place, _parse_json(line, place)


def _parse_json(line: bytes, place: Place) -> object:
    try:
        row = parse_json(line.removeprefix(codecs.BOM_UTF8), f"{place}: the line", DataError)
    except DataError as error:
        if isinstance(cause := error.__cause__, UnicodeDecodeError):
            said = f"{place}: not UTF-8 text (byte {cause.start + 1}); save the file as UTF-8."
        elif isinstance(cause, json.JSONDecodeError):
            said = f"{place}: not valid JSON ({cause.msg}, column {cause.colno}); each line must be one JSON object."
        else:
            said = str(error)
        raise DataError(said) from None
    if _ESCAPED_SURROGATE.search(line) and not is_text(json.dumps(row, ensure_ascii=False)):
        raise DataError(f"{place}: {HALF_PAIR}; save the file as UTF-8.")
    return row


def _read_csv(path: str, delimiter: str = ",") -> Rows:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(file, path), delimiter=delimiter, strict=True)
        try:
            header: list[str] = next(reader, [])
            _refuse_doubled(header, path)
            start = reader.line_num + 1
            for cells in reader:
                place = Place(path, unit(path), start)
                start = reader.line_num + 1  # a quoted cell may span lines: a record's place is its first one
                if cells:
                    yield place, _named_cells(cells, header, place)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, after line {reader.line_num}: not UTF-8 text ({error.reason}).") from None
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}); JSONL has no limits.") from None


def _named_cells(cells: list[str], header: list[str], place: Place) -> dict[str, str]:
    if len(cells) != len(header):
        names = quoted(", ".join(header), bare=True)
        raise DataError(f"{place}: {len(cells)} cells, but the header names {len(header)} ({names}).")
    return dict(zip(header, cells))


def _refuse_doubled(names: list[str], path: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(
                f"data file {quoted(path)} has {count} columns called {quoted(name)}; one of them is valid."
            )


def _read_tsv(path: str) -> Rows:
    return _read_csv(path, delimiter="\t")


def _read_parquet(path: str) -> Rows:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_doubled(file.schema_arrow.names, path)
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield Place(path, unit(path), number), row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        reason = quoted((str(error) or type(error).__name__).splitlines()[0], bare=True).rstrip(".")
        raise DataError(f"data file {quoted(path)} is not a readable Parquet file ({reason}).") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
