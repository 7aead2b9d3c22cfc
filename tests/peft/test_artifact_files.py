"""Files of an artifact: readable as the umask says, whole or not there, whatever disk and process meet."""

import json
import multiprocessing
import os
import random
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftwork.errors import CheckpointError, GraftworkError
from graftwork.peft import LoRA
from graftwork.peft.artifact import directory as artifact
from tests.contracts.methods import make, shake
from tests.peft import saver

CONFIG, TENSORS, CARD, PROOF = "adapter_config.json", "adapter_model.safetensors", "README.md", "proof.json"


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_an_artifact_is_as_readable_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    model = make()
    model.add_adapter(LoRA(dim=4))
    for _ in range(2):  # made, then replaced
        model.save_adapters(tmp_path / "adapter")
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "adapter").iterdir()}
        assert modes == dict.fromkeys((CONFIG, TENSORS, CARD, PROOF), 0o666 & ~umask)
        assert stat.S_IMODE((tmp_path / "adapter").stat().st_mode) == 0o777 & ~umask


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be read; where none can be mounted, a place that is no directory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        disk.rmdir()
        disk.write_text("")
        yield disk
        return
    (disk / "adapter").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["adapter", "new", "deep/er/adapter"])
def test_a_place_that_cannot_be_written_is_one_sentence(name: str, read_only: Path) -> None:
    model = make()
    model.add_adapter(LoRA(dim=4))
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        model.save_adapters(read_only / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", range(1, 13))
def test_a_disk_that_is_full_at_any_moment_keeps_the_previous_adapter(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call to the disk is refused; whichever it is, the old adapter is whole and nothing lies beside it."""
    model = make(sizes={"num_layers": 1})
    model.add_adapter(LoRA(dim=4))
    model.save_adapters(tmp_path / "adapter")
    files = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    shake(model)
    calls = 0

    def failing(exact):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(28, os.strerror(28))
            return exact(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", failing(Path.mkdir))
        patch.setattr(Path, "write_text", failing(Path.write_text))
        patch.setattr(artifact, "save_file", failing(artifact.save_file))
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "rename", failing(os.rename))
        try:
            model.save_adapters(tmp_path / "adapter")
            saved = True
        except GraftworkError as error:
            assert "disk is full" in str(error) and "\n" not in str(error)
            saved = False
    now = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    assert sorted(now) == sorted(files) and (now == files) == (not saved)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    make(sizes={"num_layers": 1}).load_adapters(tmp_path / "adapter")


def killed(times: int, path: Path) -> list[float]:
    """Kill a process at ``times`` random moments of its saves; return the values of the artifacts left behind."""
    model = make(sizes={"num_layers": 1})
    model.add_adapter(LoRA(dim=4))
    config = json.loads((model.save_adapters(path) / CONFIG).read_text())
    del config["checksum"]
    context, rng, found = multiprocessing.get_context("forkserver"), random.Random(1), []
    context.set_forkserver_preload(["tests.peft.saver"])
    for _ in range(times):
        ready, tell = context.Pipe(duplex=False)
        process = context.Process(target=saver.save_for_ever, args=(path, config, tell))
        process.start()
        tell.close()
        assert ready.poll(120) and ready.recv()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        ready.close()
        with artifact.opened(path):
            values = {float(v) for tensor in load_file(path / TENSORS).values() for v in tensor.unique()}
        assert len(values) == 1, "tensors of two saves"
        found += values
        assert set(os.listdir(path)) == {CONFIG, TENSORS, CARD}
        for left in path.parent.glob(".*.tmp"):
            shutil.rmtree(left)
    return found


@pytest.mark.processes
def test_a_killed_save_leaves_a_whole_adapter(tmp_path: Path) -> None:
    found = killed(20, tmp_path / "adapter")
    assert len(found) == 20 and len(set(found)) > 1, "killed at different moments"


@pytest.mark.slow
@pytest.mark.processes
def test_many_killed_saves_leave_a_whole_adapter(tmp_path: Path) -> None:
    found = killed(50, tmp_path / "adapter")
    assert len(found) == 50


def test_the_savers_tensors_tell_one_save_from_another() -> None:
    assert not torch.equal(saver.tensors(1.0)["lora.x0"], saver.tensors(2.0)["lora.x0"])
