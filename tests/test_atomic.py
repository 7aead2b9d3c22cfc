"""A directory or file appears whole or not at all, whatever goes wrong on the way."""

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from graftwork import atomic
from graftwork.atomic import atomic_directory, atomic_write_bytes, atomic_write_text
from graftwork.errors import CheckpointError


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_directory_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "artifact"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("1")
        assert temporary.parent == target.parent
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["artifact"]


@pytest.mark.parametrize("exchange", [True, False])
def test_directory_replaces_the_old_one_as_a_whole(tmp_path: Path, monkeypatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = tmp_path / "artifact"
    for content in ("old", "new"):
        with atomic_directory(target) as temporary:
            (temporary / content).write_text(content)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["artifact"]


def test_failure_keeps_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with atomic_directory(target) as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(RuntimeError, match="boom"), atomic_directory(target) as temporary:
        (temporary / "new").write_text("2")
        raise RuntimeError("boom")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["artifact"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(CheckpointError, match="the disk is full") as caught,
        atomic_directory(tmp_path / "x") as temporary,
    ):
        (temporary / "half").write_text("half")
        raise error
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_really_full_device_is_the_same_sentence(tmp_path: Path) -> None:
    # /dev/full answers every write with ENOSPC.
    with (
        pytest.raises(CheckpointError, match="the disk is full"),
        atomic_directory(tmp_path / "x"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"1")


def test_place_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        atomic_write_text(tmp_path / "file" / "x", "1")


def _write_and_die(target: str) -> None:
    with atomic_directory(target) as temporary:
        (temporary / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault(
    "a kill while saving leaves half an adapter",
    "a directory appears whole or not at all",
)
def test_killed_while_writing_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with atomic_directory(target) as temporary:
        (temporary / "old").write_text("1")
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(str(target),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert names(target) == ["old"]


def test_files(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "config.json"
    atomic_write_text(path, "één")
    assert path.read_text(encoding="utf-8") == "één"
    atomic_write_bytes(path, b"2")
    monkeypatch.setattr(os, "fsync", _raise_full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        atomic_write_bytes(path, b"3")
    assert path.read_bytes() == b"2"
    assert names(tmp_path) == ["config.json"]


def _raise_full(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
