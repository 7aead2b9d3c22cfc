"""Read rows from JSONL, CSV and Parquet files, one at a time, each with its place in the file."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from graftwork.cache import sha256
from graftwork.data.schema import Place
from graftwork.errors import DataError, suggest

Rows = Iterator[tuple[Place, object]]


def check_file(path: str) -> None:
    """Raise DataError unless ``path`` is a readable file of a known kind."""
    file = Path(path)
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir() if p.suffix in READERS] if file.parent.is_dir() else []
        where = suggest(file.name, beside) if beside else f"no data file is in {str(file.parent)!r}."
        raise DataError(f"data file {path!r} does not exist; {where}")
    if file.suffix not in READERS:
        raise DataError(f"data file {path!r} has an unknown kind {file.suffix!r}; valid: {', '.join(sorted(READERS))}.")


def read_rows(path: str) -> Rows:
    """Yield ``(place, row)`` for every row of ``path``; raises DataError when the file is broken or has no rows."""
    check_file(path)
    empty = True
    for placed in READERS[Path(path).suffix](path):
        empty = False
        yield placed
    if empty:
        raise DataError(f"data file {path!r} has no rows.")


def unit(path: str) -> str:
    """What rows are numbered by in a file of this kind."""
    return "row" if Path(path).suffix == ".parquet" else "line"


def content_hash(path: str) -> str:
    """SHA-256 of the file's bytes, as hex."""
    check_file(path)
    return sha256(Path(path))


def _read_jsonl(path: str) -> Rows:
    # Bytes, not text: an invalid byte is then reported with its line.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = Place(path, unit(path), number)
            if line.strip():
                yield place, _parse_json(line, place)


def _parse_json(line: bytes, place: Place) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not valid JSON ({error.msg}, column {error.colno}); each line must be one JSON object."
        ) from None


def _read_csv(path: str, delimiter: str = ",") -> Rows:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header: list[str] = next(reader, [])
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
        raise DataError(f"{place}: {len(cells)} cells, but the header names {len(header)} ({', '.join(header)}).")
    return dict(zip(header, cells))


def _read_tsv(path: str) -> Rows:
    return _read_csv(path, delimiter="\t")


def _read_parquet(path: str) -> Rows:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield Place(path, unit(path), number), row
    except pyarrow.ArrowException as error:
        raise DataError(f"data file {path!r} is not a readable Parquet file ({str(error).splitlines()[0]}).") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
