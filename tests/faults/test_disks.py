"""Full disks and closed directories: refused before the first step where that can be known, else one sentence."""

import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants
from lightning.pytorch import Callback, Trainer

from graftwork.cli.context import one_line_errors
from graftwork.errors import CheckpointError, GraftworkError
from graftwork.models.weights.files import INDEX
from graftwork.models.weights.hub import resolve
from graftwork.peft import LoRA
from graftwork.training.callbacks import TrainingState, room
from graftwork.training.run_directory import latest, states
from graftwork.training.state import checkpoint
from tests.helpers import tiny_run
from tests.helpers.moments import Act, watched
from tests.helpers.tiny_hf import tiny_model
from tests.helpers.tiny_run import finetune

FREED = ("os.remove", "os.rmdir")
"""What a full disk still allows."""


def train(root: Path, data: Path, peft: list[LoRA] | None = None, **options: Any) -> dict[str, Any]:
    """Four steps with a validation and a state every second one."""
    callbacks, dtype = [TrainingState(every_n_steps=2), *options.pop("callbacks", [])], options.pop("dtype", None)
    settings = {"max_steps": 4, "val_check_interval": 2, "enable_progress_bar": False, **options}
    trainer = tiny_run.trainer(root, callbacks=callbacks, **settings)
    rows = tiny_run.data_module(data)
    rows.cache_dir = str(root / "cache")
    model = tiny_run.model(dtype=dtype)
    return dict(finetune(model, trainer, rows, peft, tiny_run.optim(schedule="constant")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and rows."""
    return tiny_run.write_data(tmp_path_factory.mktemp("data"))


class Whole(NamedTuple):
    """A run that met nothing: its calls and its results."""

    calls: list[str]
    files: dict[str, bytes]


def results(root: Path) -> dict[str, bytes]:
    """Return the tensor files of the results."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.glob("*/*.safetensors"))}


@pytest.fixture(scope="module")
def wholes(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """A whole run of each kind."""
    found = {}
    for kind in ("adapter", "full"):
        root = tmp_path_factory.mktemp(kind)
        with watched(root) as calls:
            train(root, data, stack(kind))
        found[kind] = Whole(calls, results(root))
    return found


def stack(kind: str) -> list[LoRA]:
    """Return the run's adapters."""
    return [LoRA(dim=4)] if kind == "adapter" else []


def fail_from(moment: int, number: int) -> Act:
    """Refuse call ``moment`` and all after it, as a disk does that has become full, or read-only."""

    def act(at: int, call: str) -> None:
        if at >= moment and not (number == errno.ENOSPC and call.startswith(FREED)):
            raise OSError(number, os.strerror(number), call.split(" ", 1)[1])

    return act


# What is being written when the disk fails: the lock, the logs, the token cache, artifacts, states, summary, picture.
PLACES = (
    r"open /\.lock",
    r"os.mkdir /logs",
    r"open /logs/.*hparams",
    r"open /logs/.*metrics.csv",
    r"os.mkdir /cache/tokens",
    r"open /cache/tokens/\..*\.lock",
    r"open /cache/tokens/.*report.json",
    r"os.mkdir /\.adapter\.",
    r"open /\.adapter\..*config",
    r"os.rename /\.adapter\.",
    r"os.mkdir /checkpoints$",
    r"open /checkpoints/\.step-00000004.*__0_0.distcp",
    r"open /checkpoints/\.step-00000004.*\.metadata",
    r"open /checkpoints/\.step-00000004.*state.json",
    r"os.fsync /checkpoints/\.step-00000004",
    r"os.rename /checkpoints/\.step-00000004",
    r"open /\.summary",
    r"os.rename /\.summary",
    r"open /\.loss",
)
EXPORT = (r"os.mkdir /\.model\.", r"open /\.model.*safetensors", r"os.fsync /\.model", r"os.rename /\.model")


def moment_of(whole: Whole, place: str) -> int:
    """Return the number of the first call at ``place``."""
    return next(number for number, call in enumerate(whole.calls) if re.match(place, call))


def failed_and_healed(root: Path, data: Path, kind: str, whole: Whole, moment: int, number: int) -> None:
    """One sentence, nothing half-written is visible, and when the disk is well again, everything is."""
    with watched(root, fail_from(moment, number)), pytest.raises(GraftworkError) as caught:
        train(root, data, stack(kind))
    told = str(caught.value)
    assert "\n" not in told and len(told) < 600 and "Error" not in told, told
    if number == errno.ENOSPC and re.match(r"os.rename|os.fsync|open .*(tmp|adapter|model|step)", whole.calls[moment]):
        assert "full" in told or "No space left" in told, told
    for state in states(root):
        checkpoint.read_common(state)
    seen = results(root)
    assert all(whole.files[name] == value or name.startswith("adapter/") for name, value in seen.items())
    train(root, data, stack(kind))
    assert results(root) == whole.files


@pytest.mark.fault(
    "a full disk in the middle of a run leaves half a file, a traceback, or an exit code of 0",
    "at every write: one sentence, what was saved before stays, and the run resumes to the same bits",
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
@pytest.mark.parametrize("place", [p if i % 3 == 0 else pytest.param(p, marks=pytest.mark.slow)
                                   for i, p in enumerate(PLACES)])  # fmt: skip
def test_the_disk_fails_at_a_write(
    place: str, number: int, data: Path, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    failed_and_healed(tmp_path, data, "adapter", wholes["adapter"], moment_of(wholes["adapter"], place), number)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
@pytest.mark.parametrize("place", [p if i == 1 else pytest.param(p, marks=pytest.mark.slow)
                                   for i, p in enumerate(EXPORT)])  # fmt: skip
def test_the_disk_fails_at_the_export(
    place: str, number: int, data: Path, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    failed_and_healed(tmp_path, data, "full", wholes["full"], moment_of(wholes["full"], place), number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_the_disk_fails_at_every_call(
    kind: str, number: int, data: Path, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    whole, tried = wholes[kind], 0
    for moment, call in enumerate(whole.calls):
        if call.startswith(FREED):
            continue  # what cannot be removed is removed the next time
        failed_and_healed(tmp_path / str(moment), data, kind, whole, moment, number)
        tried += 1
    print(f"{kind}, {errno.errorcode[number]}: failed at {tried} calls, lost 0")


@pytest.mark.fault(
    "a run that is stopped, or whose disk is full, between its last step and its result never writes the result",
    "a run that is started again at its end makes up for what is missing",
)
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_stopped_after_the_last_step(kind: str, data: Path, wholes: dict[str, Whole], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, data, stack(kind), callbacks=[tiny_run.StopAfter(4)])
    assert stopped.value.code == 75 and latest(tmp_path).name == "step-00000004"  # type: ignore[union-attr]
    train(tmp_path, data, stack(kind))
    assert results(tmp_path) == wholes[kind].files


# ---- room -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "full", "full_bf16"])
def test_the_estimate_is_what_is_written(kind: str, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    found: list[room.Need] = []
    monkeypatch.setattr(room, "check", found.extend)
    train(tmp_path, data, stack(kind), dtype="bf16" if kind == "full_bf16" else "fp32")
    written = {"result": bytes_of(*tmp_path.glob("adapter*"), *tmp_path.glob("model")), "states": bytes_of(
        *(state / "tensors" for state in states(tmp_path)))}  # fmt: skip
    estimate = {"result": found[0].size, "states": found[1].size}
    # Headers and names come on top, a few kilobytes for each tensor of the state.
    for what, size in written.items():
        assert estimate[what] <= size <= 1.3 * estimate[what] + 250_000, (what, estimate, written)


def bytes_of(*places: Path) -> int:
    """Return the bytes of all files below."""
    return sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())


@pytest.mark.fault(
    "a full disk at the end of full fine-tuning loses the result",
    "room for the result and the states is asked for before the first step",
)
def test_too_little_room_is_refused_before_the_first_step(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Steps(Callback):
        """Fails when a step begins."""

        def on_train_batch_start(self, *_: Any) -> None:
            """Fail."""
            raise AssertionError("a step was made")

    needed = 37_856 * (4 + 2 * (4 + 8))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: usage._replace(free=needed - 1))
    words = (
        rf"has {needed - 1:,} bytes free and the run needs {needed:,} \(model/ 151,424, 2 training state\(s\) 908,544\)"
    )
    with pytest.raises(CheckpointError, match=words) as caught:
        train(tmp_path, data, [], callbacks=[Steps()])
    assert "\n" not in str(caught.value) and not states(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: usage._replace(free=needed))
    train(tmp_path, data, [])
    assert (tmp_path / "model").is_dir()


def test_a_resumed_run_needs_room_for_one_state_less(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    train(tmp_path, data, [LoRA(dim=4)], max_steps=2)
    found: list[room.Need] = []
    monkeypatch.setattr(room, "check", found.extend)
    train(tmp_path, data, [LoRA(dim=4)])
    assert found[1] == room.Need("1 training state(s)", tmp_path, 3_328 * 12)


# ---- a real disk ----------------------------------------------------------------------------------------------------


class Fill(Callback):
    """Fills the disk of ``root`` while step ``step`` runs."""

    def __init__(self, root: Path, step: int) -> None:
        self.root, self.step = root, step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Write until nothing more goes in; where the disk is not our own, no file may grow any more."""
        if trainer.global_step + 1 != self.step:
            return
        if not os.path.ismount(self.root.parent):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        with pytest.raises(OSError, match="No space left"), open(self.root.parent / "ballast", "wb", 0) as file:
            while True:
                file.write(b"\0" * 4096)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk of 4 MB; without the right to mount one, an ordinary one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield disk / "run"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("step", [1, 3])
def test_a_really_full_disk(step: int, data: Path, wholes: dict[str, Whole], small_disk: Path, capsys: Any) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(SystemExit) as exited, one_line_errors():
        train(small_disk, data, [LoRA(dim=4)], callbacks=[Fill(small_disk, step)])
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exited.value.code not in (0, None) and len(told) == 1 and "full" in told[0] + "too large", told
    assert [state.name for state in states(small_disk)] == (["step-00000002"] if step == 3 else [])
    (small_disk.parent / "ballast").unlink(missing_ok=True)
    train(small_disk, data, [LoRA(dim=4)])
    assert results(small_disk) == wholes["adapter"].files


@pytest.mark.parametrize("log", ["CSVLogger", "TensorBoardLogger"])
def test_lost_logs_do_not_lose_the_run(log: str, data: Path, wholes: dict[str, Whole], tmp_path: Path) -> None:
    """From the second step on nothing can be written to one of the logs."""
    target = {"CSVLogger": "lightning.fabric.loggers.csv_logs._ExperimentWriter.save", "TensorBoardLogger":
              "tensorboard.summary.writer.record_writer.RecordWriter.write"}[log]  # fmt: skip

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(CheckpointError, match="results are whole, but lines of .* are lost: No space left"):
            train(tmp_path, data, [LoRA(dim=4)])
    assert results(tmp_path) == wholes["adapter"].files and (tmp_path / "summary.json").exists()


# ---- interrupted downloads ------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of two shards in the hub's cache, without network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--owner--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    place = folder / "snapshots" / ("a" * 40)
    tiny_model("llama").save_pretrained(place, max_shard_size="60KB")
    assert len(list(place.glob("*.safetensors"))) > 1
    return place


@pytest.mark.fault(
    "an interrupted download of a base is taken for the whole",
    "a cached snapshot counts when every file of its index is there; where parts lie about the hub is asked again",
)
@pytest.mark.parametrize("lost", ["one shard", "index", "config.json"])
def test_an_interrupted_download_is_not_read(lost: str, snapshot: Path) -> None:
    assert resolve("owner/tiny") == snapshot
    shard = sorted(snapshot.glob("*.safetensors"))[-1]
    {"one shard": shard, "index": snapshot / INDEX}.get(lost, snapshot / lost).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint .* run: hf download owner/tiny"):
        resolve("owner/tiny")


@pytest.mark.parametrize("lost", ["a shard", "chat_template.jinja"])
def test_an_interrupted_download_goes_on(lost: str, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache lacks a file; the hub, when it is asked, brings it."""
    shard = sorted(snapshot.glob("*.safetensors"))[-1]
    if lost != "a shard":  # nothing but the part of it that had arrived tells that it should be there
        shard = snapshot / lost
        shard.write_text("{{ messages }}")
        (snapshot.parent.parent / "blobs" / "abc.incomplete").write_bytes(b"{{ mess")
    held, asked = shard.read_bytes(), []
    shard.unlink()

    def download(name: str, local_files_only: bool, **_: Any) -> str:
        asked.append(local_files_only)
        if not local_files_only:
            shard.write_bytes(held)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/tiny") == snapshot and asked == [True, False] and shard.is_file()
