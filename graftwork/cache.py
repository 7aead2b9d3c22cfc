"""The user's cache: converted checkpoints and fingerprints, one writer at a time."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graftwork.errors import CheckpointError


def cache_directory() -> Path:
    """``$GRAFTWORK_CACHE``, else ``$XDG_CACHE_HOME/graftwork``, else ``~/.cache/graftwork``."""
    chosen = os.environ.get("GRAFTWORK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftwork"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``; other processes of this user wait, a killed holder frees it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        place = str(path.parent)
        raise CheckpointError(
            f"the cache {place!r} cannot be written ({error.strerror}); set GRAFTWORK_CACHE to another place."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_stamp(*files: Path) -> str:
    """Hash of the files' places, sizes and change times: equal as long as nobody touches them."""
    digest = hashlib.sha256()
    for file in sorted(files):
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
