"""What a split is read from: a file, a directory of files, a data set as Hugging Face saves it, or several of these."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Optional, Union

from graftwork.data import files
from graftwork.data.files import KINDS, Rows, check_file, is_data
from graftwork.data.row_layout import in_one_layout
from graftwork.errors import DataError, quoted
from graftwork.jsonfile import named_inside, read_object

Source = Union[list[str], str]
"""One file or directory, or several."""

MOST_NAMED = 4
"""Parts that a sentence names; of more it names the first."""

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
"""Files beside the rows of ``save_to_disk``: a data set has the first two, several splits have the last."""


def parts(source: Source) -> list[str]:
    """Return the files and directories of a source; raises DataError where it names none, or one twice."""
    if isinstance(source, str):
        if source.startswith("[") and source.endswith("]") and not Path(source).exists():
            raise DataError(f"data file {quoted(source)} does not exist; names in a list need quotes: ['a.jsonl'].")
        return [source]
    if not source:
        raise DataError("a list of data files names none; give at least one.")
    for name in source:
        if source.count(name) > 1:
            raise DataError(f"data file {quoted(name)} is named twice; once is valid, weights say how often it counts.")
    return list(source)


def files_of(path: str) -> list[str]:
    """Return the files of a part, in their order; raises DataError for a directory without any, or a damaged one."""
    folder = Path(path)
    if not folder.is_dir():
        return [path]
    try:
        if (folder / SPLITS).is_file():
            splits = ", ".join(sorted(quoted(one.name, bare=True) for one in folder.iterdir() if one.is_dir()))
            raise DataError(f"data set {quoted(path)} has the splits {splits}; name one of them: {path}/SPLIT.")
        if (folder / STATE).is_file() and (folder / INFO).is_file():
            return _saved(folder)
        found = sorted(p for p in folder.iterdir() if p.is_file() and is_data(p) and not p.name.startswith((".", "_")))
    except OSError as error:
        raise DataError(f"data directory {quoted(path)} cannot be read: {error.strerror}.") from error
    if not found:
        raise DataError(f"data directory {quoted(path)} holds no data file; {KINDS}.")
    return [str(file) for file in found]


def _saved(folder: Path) -> list[str]:
    """Return the Arrow files of a data set that ``save_to_disk`` wrote."""
    said = read_object(folder / STATE, DataError).get("_data_files")
    entries = said if isinstance(said, list) else []
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    if not names:
        raise DataError(f"data set {quoted(folder)} names no files of rows in {STATE}; save it again.")
    return [str(named_inside(folder, name, f"{quoted(folder / STATE)}", DataError)) for name in names]


def source_files(source: Source) -> list[str]:
    """Return every file of a source, in the order in which its rows are counted."""
    return [file for part in parts(source) for file in files_of(part)]


def check_source(source: Source) -> None:
    """Raise DataError unless every file of the source is there and of a known kind."""
    for file in source_files(source):
        check_file(file)


def read_source(source: Source, layout: Optional[str] = None) -> Rows:
    """Yield ``(place, row)`` of every file; raises DataError as ``read_rows`` and ``in_one_layout`` do."""
    for file in source_files(source):
        yield from in_one_layout(files.read_rows(file), layout)


def content_hash(part: str) -> str:
    """SHA-256 of a file's bytes, or of names and contents of a directory's files, as hex."""
    if not Path(part).is_dir():
        return files.content_hash(part)
    lines = (f"{Path(file).name}\0{files.content_hash(file)}\n" for file in files_of(part))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def named(source: Optional[Source]) -> Iterator[str]:
    """Yield the parts as they are named, none where there is no source."""
    yield from [] if source is None else parts(source)


def content_hashes(source: Optional[Source]) -> Union[str, list[str], None]:
    """The content hash of a source: one, or one for each of several parts; None where there is none."""
    found = [content_hash(part) for part in named(source)]
    return found[0] if isinstance(source, str) else found or None


def title(source: Source) -> str:
    """A source in words."""
    found = parts(source)
    return ", ".join(found) if len(found) <= MOST_NAMED else f"{found[0]} and {len(found) - 1} more"
