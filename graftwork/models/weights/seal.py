"""Seal of a converted model in the cache: what its files were when they were written."""

import json
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from graftwork.atomic import atomic_write_text, clear_leftovers
from graftwork.cache import file_stamp, sha256
from graftwork.errors import CheckpointError
from graftwork.jsonfile import read_schema


class Seal(BaseModel):
    """``files``: SHA-256 of each file by name; ``stamp``: ``file_stamp`` of all of them, which saves reading them."""

    files: dict[str, str]
    stamp: str


def seal(directory: Path) -> None:
    """Note, beside ``directory``, what its files are."""
    files = _files(directory)
    held = Seal(files={file.name: sha256(file) for file in files}, stamp=file_stamp(*files))
    atomic_write_text(_place(directory), json.dumps(held.model_dump(), indent=2) + "\n")


def is_as_written(directory: Path) -> bool:
    """Tell whether ``directory`` holds exactly the files that were sealed, byte by byte."""
    if not directory.is_dir() or not _place(directory).is_file():
        return False
    try:
        held, files = read_schema(_place(directory), Seal, CheckpointError), _files(directory)
    except CheckpointError:
        return False
    if file_stamp(*files) == held.stamp and {file.name for file in files} == held.files.keys():
        return True
    if {file.name: sha256(file) for file in files} != held.files:
        return False
    with suppress(CheckpointError):  # copied or touched: the same files with new times; a cache may be read-only
        seal(directory)
    return True


def clear(directory: Path) -> None:
    """Delete what killed processes left half-written of ``directory`` and its seal; only who holds its lock may."""
    for path in (directory, _place(directory)):
        clear_leftovers(path.parent, path.name)


def _files(directory: Path) -> list[Path]:
    """Every file of ``directory``; raises CheckpointError for anything else in it: nothing else was written."""
    found = sorted(directory.iterdir())
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{str(path)!r} is no regular file.")
    return found


def _place(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.seal.json")
