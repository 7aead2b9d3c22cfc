"""The user's cache: where it is, one writer at a time, and what tells a changed file. What is kept there, no."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from graftwork.errors import CheckpointError, GraftworkError


def cache_directory() -> Path:
    """``$GRAFTWORK_CACHE``, else ``$XDG_CACHE_HOME/graftwork``, else ``~/.cache/graftwork``."""
    chosen = os.environ.get("GRAFTWORK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftwork"


def unwritable(directory: Path, error: OSError) -> GraftworkError:
    """Return the CheckpointError of a cache ``directory`` that cannot be written."""
    return CheckpointError(
        f"the cache {str(directory)!r} cannot be written ({error.strerror}); set GRAFTWORK_CACHE to another place."
    )


@contextmanager
def locked(path: Path, refusal: Callable[[Path, OSError], GraftworkError] = unwritable) -> Iterator[None]:
    """Hold the lock of ``path``; other threads and processes of this user wait, a killed holder frees it.

    Raises what ``refusal(directory, error)`` returns when the directory of ``path`` cannot be written.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        make_private(path.parent)
        lock.acquire()
    except OSError as error:
        raise refusal(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def make_private(directory: Path) -> None:
    """Make ``directory`` and those above it that are missing, for this user alone; what is there stays as it is."""
    missing = [one for one in (directory, *directory.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)
    directory.mkdir(exist_ok=True)  # refuses a file in its place


def file_stamp(*files: Path) -> str:
    """Hash of the files' places, inodes, sizes and change times: equal as long as nobody touches or replaces them."""
    digest = hashlib.sha256()
    for file in sorted(files):
        status = file.stat()
        marks = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(f"{file.resolve()}\0{marks}\n".encode())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
