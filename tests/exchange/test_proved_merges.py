"""Merges and combinations are proved from their files, with a layer in memory, before they are published."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork import models
from graftwork.errors import ArtifactError
from graftwork.inference.verify import verify_directory
from graftwork.models.merging import Blend, combine, combine_directories, merge_combined, merge_directory, write
from graftwork.models.merging.proved import nudged
from graftwork.peft import DoRA, LoRA, Selective
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import make_tiny

REFUSED = "what was written fails its proof"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory with a base and two adapters."""
    make_tiny("llama", tmp_path / "base")
    for name, scale in (("first", 0.05), ("second", 0.08)):
        model = models.load(tmp_path / "base")
        model.add_adapter(LoRA(dim=4, alpha=8))
        shake(model, scale)
        model.eval().save_adapters(tmp_path / name)
    return tmp_path


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "proof.json").read_text())
    return found


def changed(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a writer that changes one tensor on its way to the disk."""
    exact = write.write_sharded

    def sharded(directory: Path, entries: list[Any], tensors: Iterator[Tensor], most: int) -> None:
        exact(directory, entries, (change(t) if i == 9 else t for i, t in enumerate(tensors)), most)

    return sharded


def one_bit(tensor: Tensor) -> Tensor:
    bits = tensor.contiguous().view(torch.int32).clone()
    bits.view(-1)[-1] ^= 1
    return bits.view(torch.float32)


def negated(tensor: Tensor) -> Tensor:
    return -tensor


@pytest.mark.parametrize("change", [one_bit, negated])
def test_a_tensor_that_was_written_wrong_is_never_published(
    change: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "write_sharded", changed(change))
    for merge, given in ((merge_directory, "first"), (merge_combined, ["first", "second"])):
        what = place / given if isinstance(given, str) else [place / name for name in given]
        more = () if isinstance(given, str) else (Blend([0.5, 0.5]),)
        with pytest.raises(ArtifactError, match=f"The adapter was not merged: {REFUSED}, the files hold other values"):
            merge(what, place / "out", *more, base=place / "base")
        assert sorted(p.name for p in place.iterdir()) == ["base", "first", "second"]
    merge_directory(place / "first", place / "out", place / "base", verify=False)  # nothing else would have noticed
    assert not (place / "out" / "proof.json").exists()


def test_a_mistake_smaller_than_a_fixed_tolerance_is_seen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 nothing is rounded, so a hundredth of the update that is lost is too much; in bf16 a tenth is."""
    exact = write.changes_of

    def weaker(share: float) -> Any:
        def changes(source: Any) -> Any:
            found = exact(source)
            for made in found.linears.values():
                for index, one in enumerate(made):
                    full = one.weight
                    made[index] = type(one)(one.who, lambda w, own, full=full: w + (1 - share) * (full(w, own) - w))
            return found

        return changes

    for dtype, share in (("fp32", 0.01), ("bf16", 0.1)):
        monkeypatch.setattr(write, "changes_of", weaker(share))
        with pytest.raises(ArtifactError, match=f"{REFUSED}, the logits of lora from the files are"):
            merge_directory(place / "first", place / "out", place / "base", dtype=dtype)
    monkeypatch.setattr(write, "changes_of", exact)
    for dtype in ("fp32", "bf16"):
        merge_directory(place / "first", place / dtype, place / "base", dtype=dtype)
    assert content(place / "fp32")["tolerance"] == 1e-4 < content(place / "bf16")["tolerance"]


def test_tensors_of_the_base_and_lengths_of_rows_are_proved_too(place: Path) -> None:
    model = models.load(place / "base")
    model.add_adapter([DoRA(dim=4), Selective(patterns=["linear_fc2.weight", "norm"])])
    shake(model, 0.05)
    model.save_adapters(place / "both")
    merge_directory(place / "both", place / "out", place / "base")
    assert [view["adapters"] for view in content(place / "out")["views"]] == [[], ["dora", "selective"]]
    assert verify_directory(place / "out").ok


def test_a_nudge_is_less_than_a_rounding() -> None:
    held = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    moved = nudged(lambda name: True, "x", held)
    assert float((moved - held).abs().max()) > 0 and float(((moved - held) / held).abs().max()) <= 2**-8
    assert (moved.bfloat16() != held).float().mean() < 0.02, "all but powers of two, below which values stand closer"
    assert nudged(lambda name: False, "x", held) is held


def combined(place: Path, output: str = "out", **blend: Any) -> Path:
    adapters = [place / "first", place / "second"]
    return combine_directories(adapters, place / output, Blend([0.7, -0.4], **blend), place / "base")


@pytest.mark.parametrize("way", ["cat", "svd", "linear"])
def test_a_combination_is_proved(way: str, place: Path) -> None:
    combined(place, combine=way)
    assert verify_directory(place / "out", str(place / "base")).ok
    merge_combined([place / "first", place / "second"], place / "merged", Blend([0.7, -0.4], way), place / "base")
    assert verify_directory(place / "out", str(place / "base"), str(place / "merged")).ok


def test_a_sum_that_is_none_is_never_published(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are what was combined, which is not the sum: only the comparison with the parts tells."""
    combined(place)
    before = {p: p.read_bytes() for p in (place / "out").iterdir()}
    exact = combine.WAYS["cat"]
    monkeypatch.setitem(combine.WAYS, "cat", lambda weighted, blend: exact([(abs(w), u) for w, u in weighted], blend))
    with pytest.raises(ArtifactError, match=f"{REFUSED}, it is not the weighted sum of its parts"):
        combined(place)
    assert {p: p.read_bytes() for p in (place / "out").iterdir()} == before


def test_without_the_base_a_combination_says_so(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    combine_directories([place / "first", place / "second"], place / "out", Blend([1, 1]))
    assert "The adapter is not verified: 'base', its base, is not at hand" in caplog.text
    assert not (place / "out" / "proof.json").exists()
