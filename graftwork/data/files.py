"""Read rows from JSON, CSV, Parquet and Arrow files, one at a time, each with its place in the file."""

import codecs
import csv
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, AnyStr

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from graftwork.cache import sha256
from graftwork.data.compressed import COMPRESSED, ending, open_bytes
from graftwork.data.json_array import array_rows, begins_array
from graftwork.data.place import Place
from graftwork.data.schema import HALF_PAIR, is_text
from graftwork.errors import DataError, quoted, suggest
from graftwork.jsonfile import MAX_BYTES, parse_json

MAX_LINE = MAX_BYTES
"""Longest line, in bytes or characters."""

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Rows = Iterator[tuple[Place, object]]


def is_data(path: Path) -> bool:
    """Whether a file is of a kind that is read, by its name."""
    return _reader(str(path)) is not None


def _reader(path: str) -> Callable[[str], Rows] | None:
    """Return what reads a file of this name, None where nothing does; text alone may be compressed."""
    found = ending(path)
    compressed = Path(path).suffix in COMPRESSED
    return None if compressed and found not in TEXT else READERS.get(found)


def check_file(path: str) -> None:
    """Raise DataError unless ``path`` is a readable file of a known kind."""
    file = Path(path)
    with _disk_errors(path):
        if not file.is_file():
            beside = [p.name for p in file.parent.iterdir() if is_data(p)] if file.parent.is_dir() else []
            where = suggest(file.name, beside) if beside else f"no data file is in {quoted(file.parent)}."
            is_there = "is no regular file" if file.exists() else "does not exist"
            raise DataError(f"data file {quoted(path)} {is_there}; {where}")
    if _reader(path) is None:
        raise DataError(f"data file {quoted(path)} has an unknown kind {quoted(''.join(file.suffixes[-2:]))}; {KINDS}.")


def read_rows(path: str) -> Rows:
    """Yield ``(place, row)`` for every row of ``path``; raises DataError when the file is broken or has no rows."""
    check_file(path)
    empty, reader = True, _reader(path)
    assert reader is not None, "a file that was checked has a reader"
    with _disk_errors(path):
        for placed in reader(path):
            empty = False
            yield placed
    if empty:
        raise DataError(f"data file {quoted(path)} has no rows.")


def unit(path: str) -> str:
    """What rows are numbered by in this file; an array is told by how it begins."""
    found = ending(path)
    if found == ".json":
        with _disk_errors(path), open_bytes(path) as file:
            return "row" if begins_array(file) else "line"
    return "row" if found in (".parquet", ".arrow") else "line"


def content_hash(path: str) -> str:
    """SHA-256 of the file's bytes, as hex."""
    check_file(path)
    with _disk_errors(path):
        return sha256(Path(path))


@contextmanager
def _disk_errors(path: str) -> Iterator[None]:
    """Turn what the system or a decompressor says of a file into a DataError; nothing else here raises OSError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = quoted(said.splitlines()[0], bare=True).rstrip(".")
        raise DataError(f"data file {quoted(path)} cannot be read: {reason}.") from error


def _lines(file: IO[AnyStr], path: str) -> Iterator[AnyStr]:
    """Yield the lines of a file; raises DataError for one so long that no row can be meant."""
    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise DataError(f"{Place(path, 'line', number)}: the line is longer than {MAX_LINE:,} characters.")
        yield line


def _read_jsonl(path: str) -> Rows:
    # Bytes, not text: an invalid byte is then reported with its line.
    with open_bytes(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            place = Place(path, "line", number)
            if line.strip():
                yield place, _parse_json(line, place)


def _read_json(path: str) -> Rows:
    if unit(path) == "line":
        yield from _read_jsonl(path)
        return
    with open_bytes(path) as file:
        for place, text in array_rows(file, path):
            yield place, _parse_json(text, place)


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
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(file, path), delimiter=delimiter, strict=True)
        try:
            header: list[str] = next(reader, [])
            _refuse_doubled(header, path)
            start = reader.line_num + 1
            for cells in reader:
                place = Place(path, "line", start)
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
    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_doubled(file.schema_arrow.names, path)
            yield from file.iter_batches(batch_size=1024)

    return _rows_of(batches(), path, "Parquet")


def _read_arrow(path: str) -> Rows:
    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.memory_map(path) as file:
            in_blocks = file.read(6) == b"ARROW1"
            file.seek(0)
            opened = pyarrow.ipc.open_file(file) if in_blocks else pyarrow.ipc.open_stream(file)
            _refuse_doubled(opened.schema.names, path)
            yield from map(opened.get_batch, range(opened.num_record_batches)) if in_blocks else opened

    return _rows_of(batches(), path, "Arrow")


def _rows_of(batches: Iterator[pyarrow.RecordBatch], path: str, kind: str) -> Rows:
    try:
        parts = (batch.slice(at, 1024) for batch in batches for at in range(0, batch.num_rows, 1024))
        for number, row in enumerate((row for part in parts for row in part.to_pylist()), 1):
            yield Place(path, "row", number), row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        reason = quoted((str(error) or type(error).__name__).splitlines()[0], bare=True).rstrip(".")
        raise DataError(f"data file {quoted(path)} is not a readable {kind} file ({reason}).") from None


TEXT: dict[str, Callable[[str], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
READERS: dict[str, Callable[[str], Rows]] = {**TEXT, ".parquet": _read_parquet, ".arrow": _read_arrow}
KINDS = f"valid: {', '.join(sorted(READERS))}, and text compressed as {' or '.join(COMPRESSED)}"
