"""The fingerprint names the weights: not the files, the shards or the directory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.errors import CheckpointError
from graftwork.models.weights import export_weights, fingerprint
from tests.helpers.core import loaded
from tests.helpers.tiny_hf import make_tiny


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_same_weights_in_other_files(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "one")
    module, shape = loaded(directory)
    export_weights(module, shape, tmp_path / "many", shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "many") == fingerprint(directory)


def test_one_changed_tensor_changes_it(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    before = fingerprint(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(directory) != before


def test_dtype_and_seed_change_it(tmp_path: Path) -> None:
    variants = [
        make_tiny("gpt2", tmp_path / "a"),
        make_tiny("gpt2", tmp_path / "b", seed=1),
        make_tiny("gpt2", tmp_path / "c", dtype="bfloat16"),
    ]
    assert len({fingerprint(v) for v in variants}) == 3


def test_gpt2_with_and_without_the_prefix(tmp_path: Path) -> None:
    directory = make_tiny("gpt2", tmp_path / "hf")
    before = fingerprint(directory)
    tensors = load_file(directory / "model.safetensors")
    old = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file({**old, "h.0.attn.bias": torch.ones(3)}, directory / "model.safetensors")
    assert fingerprint(directory) == before


def test_cached_until_the_files_change(tmp_path: Path, private_cache: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    value = fingerprint(directory)
    (entry,) = (private_cache / "fingerprints").iterdir()
    assert entry.read_text() == value
    entry.write_text("cached")
    assert fingerprint(directory) == "cached"
    (directory / "model.safetensors").touch()
    assert fingerprint(directory) == value


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no config.json"):
        fingerprint(tmp_path)
