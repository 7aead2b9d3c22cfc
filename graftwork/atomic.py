"""Files and directories that appear whole or not at all: temporary sibling, fsync, rename."""

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from graftwork.errors import CheckpointError, quoted

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EFBIG,
)
"""What a place answers that is there, but not to be written to."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.\d+-[0-9a-f]{8}\.tmp")
"""Name of what has not taken its target's place yet."""


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory beside ``path``: it takes ``path``'s place on success and is gone on failure.

    Raises CheckpointError when the disk is full or the place cannot be written.
    """
    target = _place(path)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(target)
        temporary.mkdir()
        try:
            yield temporary
            _open_to_readers(temporary)
            flush_tree(temporary)
            _replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step; a reader sees the old bytes or the new ones."""
    target = _place(path)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(target)
        try:
            temporary.write_bytes(data)
            _flush(temporary)
            os.replace(temporary, target)
            _flush(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` in one step."""
    atomic_write_bytes(path, text.encode())


def clear_leftovers(directory: Path, target: str | None = None) -> None:
    """Delete what killed processes left of ``target``, or of any, in ``directory``; only who alone writes there may."""
    for path in directory.iterdir() if directory.is_dir() else ():
        found = _TEMPORARY.fullmatch(path.name)
        if found is not None and target in (None, found["target"]):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def flush_tree(directory: Path) -> None:
    """Force every file and directory below ``directory`` to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            _flush(Path(folder, name))
        _flush(Path(folder))


def _place(path: str | Path) -> Path:
    if "\0" in str(path):
        raise CheckpointError(f"{quoted(str(path))} is no name of a file: it holds a NUL character.")
    return Path(path).absolute()


def _open_to_readers(directory: Path) -> None:
    """Give every file the mode that the umask gave the directory: safetensors makes its own private to the user."""
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for folder, _, files in os.walk(directory):
        for file in (Path(folder, name) for name in files):
            if not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
                file.chmod(mode)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if _disk_is_full(error):
            raise CheckpointError(
                f"the disk is full: {str(target)!r} was not written and nothing half-written was left; "
                "free some space or choose another directory."
            ) from error
        if isinstance(error, OSError) and error.errno in _CLOSED:
            where = f": {quoted(error.filename)}" if error.filename else ""
            raise CheckpointError(f"{quoted(target)} cannot be written: {error.strerror}{where}.") from error
        raise


def _disk_is_full(error: Exception) -> bool:
    # safetensors and torch report ENOSPC in their own exception classes; only the text tells.
    text = str(error)
    return getattr(error, "errno", None) in _FULL or "No space left on device" in text or "os error 28" in text


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _replace(temporary: Path, target: Path) -> None:
    """Move ``temporary`` to ``target``; an existing directory is exchanged, so ``target`` never goes missing."""
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        old = _sibling(target)
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    _flush(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one system call; False where the kernel, libc or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems refuse fsync on a directory; the rename itself is still atomic there.
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
