"""The fingerprint names the weights: not the files, the shards or the directory."""

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from graftwork.errors import CheckpointError
from graftwork.models.load import load
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
    time.sleep(0.05)  # files that have just been written are not trusted
    value = fingerprint(directory)
    (entry,) = (p for p in (private_cache / "fingerprints").iterdir() if p.suffix != ".lock")
    assert entry.read_text() == value
    entry.write_text(noted := "sha256:" + "0" * 64)
    assert fingerprint(directory) == noted
    (directory / "model.safetensors").touch()
    assert fingerprint(directory) == value
    for rubbish in ("", "cached", "0" * 64, "\0" * 10**6):
        entry.write_text(rubbish)
        assert fingerprint(directory) == value


def changed_element(directory: Path, name: str = "model.layers.2.mlp.up_proj.weight") -> None:
    """Change one element that no sample of the older fingerprint touches, in place, size and mtime as they were."""
    file = directory / "model.safetensors"
    times, tensors = file.stat(), load_file(file)
    tensors[name].view(-1)[800] += 1
    data = save(tensors, metadata={"format": "pt"})
    assert len(data) == times.st_size
    with open(file, "r+b") as handle:
        handle.write(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_one_element_changed_behind_the_clocks_back(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    sampled = fingerprint(directory, like="0" * 64)
    time.sleep(0.05)
    before = fingerprint(directory)
    changed_element(directory)
    assert fingerprint(directory) != before
    # The older kind does not see it; it is recognised by its form, so that what it stands in can still be compared.
    assert fingerprint(directory, like=sampled) == sampled and not sampled.startswith("sha256:")


def test_replaced_by_another_file_of_equal_size_and_time(tmp_path: Path) -> None:
    one, two = make_tiny("llama", tmp_path / "a"), make_tiny("llama", tmp_path / "b", seed=1)
    time.sleep(0.05)
    first, second = fingerprint(one), fingerprint(two)
    times = (one / "model.safetensors").stat()
    os.replace(two / "model.safetensors", one / "model.safetensors")
    os.utime(one / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(one) == second != first


def test_adapters_of_an_earlier_version_still_find_their_base(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    model = load(directory)
    older = model.base_identity(like="0" * 64).fingerprint
    assert older == fingerprint(directory, like="0" * 64) != model.base_identity().fingerprint


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no config.json"):
        fingerprint(tmp_path)
