"""Exports are read back from their files before they are published: what differs is refused, what was there stays."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork import models
from graftwork.errors import ArtifactError
from graftwork.models.base import Model
from graftwork.models.exchange import low_rank, piece
from graftwork.models.exchange.directory import export_directory
from graftwork.models.exchange.export import Wanted
from graftwork.peft import IA3, CanonicalLoRA, LoRA, PromptTuning, PTuning
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import make_tiny
from tests.peft.test_proof import same, state

PROOF = "proof.json"
REFUSED = "The adapter was not exported: what was written fails its proof"


def trained(root: Path, *transforms: Any) -> Model:
    model = models.load(root / "base" if (root / "base").exists() else make_tiny("llama", root / "base"))
    model.add_adapter(list(transforms))
    shake(model, 0.05)
    return model


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("way", ["live", "off", "merged"])
def test_an_export_is_proved_and_leaves_the_model_as_it_was(way: str, tmp_path: Path) -> None:
    tasks = PromptTuning("prompts", placement="before_bos", init="random", tasks={"a": 2, "b": 3})
    model = trained(tmp_path, LoRA(dim=4), tasks, PTuning("p", 3, placement="before_bos"), IA3(key_position="pre_norm"))
    model.train()
    if way == "merged":
        model.merge_adapters(["lora"])
    before = state(model)
    if way == "off":
        with model.adapters_disabled():
            model.export_adapters(tmp_path / "out")
    else:
        model.export_adapters(tmp_path / "out")
    assert same(state(model), before)
    for place, name in {"lora": "lora", "prompts/a": "prompts", "prompts/b": "prompts", "p": "p", "ia3": "ia3"}.items():
        content = json.loads((tmp_path / "out" / place / PROOF).read_text())
        assert [view["adapters"] for view in content["views"]] == [[], [name]]
        assert content["views"][0]["digest"] != content["views"][1]["digest"]
        assert content["probe"]["tasks"] == [None, None]


def damaged(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[..., None]:
    """Return a writer of one file with a fault."""
    exact = piece.write_file

    def write(path: Path, entries: Sequence[Any], tensors: Any) -> None:
        held = change({entry.name: tensor for entry, tensor in zip(entries, tensors)})
        listed = [replace(entries[0], name=name, shape=tuple(tensor.shape)) for name, tensor in held.items()]
        exact(path, listed, iter(held.values()))

    return write


def one_bit(held: dict[str, Tensor]) -> dict[str, Tensor]:
    key = list(held)[-1]
    bits = held[key].contiguous().view(torch.int32).clone()
    bits.view(-1)[-1] ^= 1
    return {**held, key: bits.view(torch.float32)}


def prefix(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("base_model.model.", "base_model."): tensor for key, tensor in held.items()}


def turned(held: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(key for key in held if "lora_B" in key)
    return {**held, key: held[key].T.contiguous()}


@pytest.mark.parametrize("change", [one_bit, prefix, turned])
@pytest.mark.parametrize("for_", ["peft", "vllm"])
def test_a_file_that_was_written_wrong_is_never_published(
    for_: str, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tmp_path, LoRA(dim=4, alpha=8))
    model.save_adapters(tmp_path / "adapter")
    model.export_adapters(tmp_path / "out", for_=for_)
    before, left = files(tmp_path), state(model)
    monkeypatch.setattr(piece, "write_file", damaged(change))
    with pytest.raises(ArtifactError, match=REFUSED) as caught:
        model.export_adapters(tmp_path / "out", for_=for_)
    assert "\n" not in str(caught.value) and same(state(model), left)
    with pytest.raises(ArtifactError, match=REFUSED):
        export_directory(tmp_path / "adapter", tmp_path / "out", Wanted(for_=for_, base=str(tmp_path / "base")), bool)
    assert files(tmp_path) == before
    model.export_adapters(tmp_path / "out", for_=for_, verify=False)  # nothing else would have noticed
    assert not (tmp_path / "out" / PROOF).exists()


def no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = low_rank.config_of

    def config(*given: Any) -> dict[str, object]:
        return exact(*given) | {"lora_alpha": 4}

    monkeypatch.setattr(low_rank, "config_of", config)


def transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = low_rank._rows_of  # of square weights no shape tells
    monkeypatch.setattr(low_rank, "_rows_of", lambda *given: exact(*given).flip(0))


def one_less(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = low_rank.pairs_of
    monkeypatch.setattr(low_rank, "pairs_of", lambda *given: exact(*given)[:-7])


MISTAKES = {no_scale: "the logits of lora from the files", transposed: "the logits of lora", one_less: "other modules"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_conversion_is_never_published(mistake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path, LoRA(dim=4, alpha=8))
    model.export_adapters(tmp_path / "out")
    before = files(tmp_path)
    mistake(monkeypatch)
    with pytest.raises(ArtifactError, match=f"{REFUSED}.*{MISTAKES[mistake]}"):
        model.export_adapters(tmp_path / "out")
    assert files(tmp_path) == before


def test_without_the_base_an_export_says_that_it_is_not_verified(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, CanonicalLoRA(dim=4)).save_adapters(tmp_path / "adapter")
    export_directory(tmp_path / "adapter", tmp_path / "out", Wanted(), bool)
    assert "The export is not verified: 'base', the base of" in caplog.text and "against=EXPORT" in caplog.text
    assert not (tmp_path / "out" / PROOF).exists()
    make_tiny("llama", tmp_path / "other" / "base", seed=1)
    monkeypatch.chdir(tmp_path / "other")
    export_directory(tmp_path / "adapter", tmp_path / "out", Wanted(), bool)
    assert not (tmp_path / "out" / PROOF).exists(), "another base of that name"
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        export_directory(tmp_path / "adapter", tmp_path / "out", Wanted(), bool, verify=False)
        monkeypatch.chdir(tmp_path)
        export_directory(tmp_path / "adapter", tmp_path / "out", Wanted(), bool)
    assert not caplog.records and (tmp_path / "out" / PROOF).exists()


def test_from_a_model_and_from_its_directory_the_proof_is_the_same(tmp_path: Path) -> None:
    model = trained(tmp_path, LoRA(dim=4), IA3(key_position="pre_norm"))
    model.save_adapters(tmp_path / "adapter")
    model.export_adapters(tmp_path / "live")
    export_directory(tmp_path / "adapter", tmp_path / "files", Wanted(base=str(tmp_path / "base")), bool)
    for name in ("lora", "ia3"):
        live, found = (json.loads((tmp_path / where / name / PROOF).read_text()) for where in ("live", "files"))
        assert live["views"] == found["views"] and live["probe"] == found["probe"]
