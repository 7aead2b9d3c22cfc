"""Disks that fill up and processes that are killed while a merged model is written: no part of it is ever visible."""

import errno
import signal
from pathlib import Path

import pytest

from graftwork import models
from graftwork.errors import CheckpointError
from graftwork.models.merging import Blend, combine_directories, merge_directory
from graftwork.peft import LoRA
from tests.contracts.methods import shake
from tests.helpers.moments import die_at, live, name_of, watched
from tests.helpers.tiny_hf import make_tiny

DIES = ("os.fsync /.merged.*.tmp", "os.rename /.merged.*.tmp")
"""Before the last file is on the disk, and before the directory takes its name."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter."""
    root = tmp_path_factory.mktemp("merges")
    model = models.load(make_tiny("llama", root / "base"))
    model.add_adapter(LoRA(dim=4))
    shake(model, 0.1)
    model.save_adapters(root / "adapter")
    return root


def merge(place: Path, root: Path) -> Path:
    return merge_directory(place / "adapter", root / "merged", place / "base")


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.fault(
    "a full disk or a closed one leaves half of a merged model, which a server then loads",
    "at every call that changes the disk: one sentence, nothing is visible, and the next merge writes the same bytes",
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_the_disk_fails_at_every_call(number: int, place: Path, tmp_path: Path) -> None:
    with watched(tmp_path / "whole") as calls:
        merge(place, tmp_path / "whole")
    renamed = next(moment for moment, call in enumerate(calls) if call.startswith("os.rename"))
    assert renamed > 5
    for moment in range(renamed + 1):  # after it everything is there
        root = tmp_path / str(moment)

        def fail(at: int, call: str, moment: int = moment) -> None:
            if at >= moment and not call.startswith(("os.remove", "os.rmdir")):
                raise OSError(number, "the disk says no")

        with watched(root, fail), pytest.raises(CheckpointError) as caught:
            merge(place, root)
        assert "\n" not in str(caught.value)
        assert not (root / "merged").exists() and not files(root)
        merge(place, root)
        assert files(root) == files(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_the_disk_fails_while_adapters_are_combined(number: int, place: Path, tmp_path: Path) -> None:
    """What was there stays: an adapter may be replaced."""
    root, adapters = tmp_path / "root", [place / "adapter"] * 2
    combine_directories(adapters, root / "both", Blend([1, 1]))
    before = files(root)
    with watched(root) as calls:
        combine_directories(adapters, root / "both", Blend([1, 1]))
    renamed = next(moment for moment, call in enumerate(calls) if call.startswith("os.fsync"))
    for moment in range(renamed + 1):

        def fail(at: int, call: str, moment: int = moment) -> None:
            if at >= moment and not call.startswith(("os.remove", "os.rmdir")):
                raise OSError(number, "the disk says no")

        with watched(root, fail), pytest.raises(CheckpointError) as caught:
            combine_directories(adapters, root / "both", Blend([2, 1]))
        assert "\n" not in str(caught.value) and files(root) == before


def merged(rank: int, world_size: int, root: Path, place: Path, named: str | None) -> list[str]:
    """Merge, up to the call that ``die_at`` means."""
    with watched(root, die_at(named)) as calls:
        merge(place, root)
    return calls


@pytest.mark.processes
@pytest.mark.fault(
    "a merge that is killed leaves a directory that looks like a model",
    "the directory takes its name when everything is in it and on the disk",
)
@pytest.mark.parametrize("named", DIES)
def test_a_killed_merge_leaves_no_output(named: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    with watched(tmp_path / "whole") as calls:
        merge(place, tmp_path / "whole")
    assert named in [name_of(call) for call in calls]
    root = tmp_path / "root"
    root.mkdir()
    assert live(merged, 1, root, place, named) == [-signal.SIGKILL]
    assert [p.name.startswith(".merged.") for p in root.iterdir()] == [True]
    merge(place, root)
    assert files(root / "merged") == files(tmp_path / "whole" / "merged")
