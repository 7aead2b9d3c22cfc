"""Tokenised rows on disk: one memory-mapped Arrow file per key, written once, shared by processes and runs."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Optional

import pyarrow
from filelock import FileLock

from graftwork.atomic import atomic_directory
from graftwork.errors import DataError

VERSION = 1
"""Part of every key; raise it when the same rows would be tokenised differently."""

Batches = Iterator[dict[str, list[Any]]]
Report = dict[str, Any]


def cache_key(**parts: object) -> str:
    """Name of what ``parts`` decide: content and tokenizer fingerprints, templates, layout, lengths."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cache_root(directory: Optional[str] = None) -> Path:
    """``directory``, else ``$GRAFTWORK_CACHE``, else ``~/.cache/graftwork``."""
    chosen = directory or os.environ.get("GRAFTWORK_CACHE") or "~/.cache/graftwork"
    return Path(chosen).expanduser() / "tokens"


def cached_table(
    root: Path, key: str, schema: pyarrow.Schema, produce: Callable[[Report], Batches]
) -> tuple[Any, Report]:
    """Return the memory-mapped ``datasets.Dataset`` and the report under ``key``; produce them when missing.

    Processes that want the same key wait for the first one; an interrupted one leaves nothing. Raises DataError
    when the cache cannot be written or read.
    """
    from datasets import Dataset

    target = root / key
    with _locked(root, key):
        if not target.exists():
            _write(target, schema, produce)
    try:
        return Dataset.from_file(str(target / "rows.arrow")), json.loads((target / "report.json").read_text())
    except (pyarrow.ArrowInvalid, FileNotFoundError, json.JSONDecodeError) as error:
        raise DataError(f"the token cache entry {str(target)!r} is damaged ({error}); delete it.") from error


def _locked(root: Path, key: str) -> AbstractContextManager:
    """Hold the key's lock until the caller leaves its ``with``."""
    lock = FileLock(root / f"{key}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        return lock.acquire()
    except OSError as error:
        raise DataError(f"the token cache {str(root)!r} cannot be written; set cache_dir to another place.") from error


def _write(target: Path, schema: pyarrow.Schema, produce: Callable[[Report], Batches]) -> None:
    report: Report = {}
    with atomic_directory(target) as directory:
        with pyarrow.OSFile(str(directory / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, schema) as out:
            for batch in produce(report):
                out.write_batch(pyarrow.RecordBatch.from_pydict(batch, schema=schema))
        (directory / "report.json").write_text(json.dumps(report))
