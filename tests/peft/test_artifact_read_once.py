"""What was verified is what is read, and a load that fails late gives every value back."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork.errors import ArtifactError
from graftwork.models import GPT, adapters
from graftwork.peft import IA3, LoRA
from graftwork.peft.artifact import tensors as artifact_tensors
from graftwork.peft.artifact.verified import BLOCK, StoredTensor, VerifiedFile
from tests.contracts.methods import make, shake

TENSORS = "adapter_model.safetensors"


def saved(path: Path, scale: float) -> Path:
    model = make()
    model.add_adapter([LoRA(dim=4), IA3()])
    shake(model, scale)
    return model.save_adapters(path)


def values(model: GPT) -> dict[str, Tensor]:
    return {t.key: t.value.clone() for name in model.adapters for t in model.stack.tensors(name)}


def after_the_check(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Do ``action`` between the check of an artifact and the reading of its values."""
    exact = adapters.Contents.of

    def of(*args: Any) -> Any:
        action()
        return exact(*args)

    monkeypatch.setattr(adapters.Contents, "of", of)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_directory_replaced_after_the_check_changes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    first, second = saved(tmp_path / "first", 0.1), saved(tmp_path / "second", 0.2)
    wanted = make()
    wanted.load_adapters(first)

    def replace() -> None:
        first.rename(tmp_path / "away")
        second.rename(first)

    after_the_check(monkeypatch, replace)
    model = make()
    model.load_adapters(first)
    assert equal(values(model), values(wanted))


@pytest.mark.parametrize("truncated", [False, True])
def test_a_file_overwritten_after_the_check_is_refused(truncated: bool, tmp_path: Path, monkeypatch: Any) -> None:
    path, other = saved(tmp_path / "first", 0.1), saved(tmp_path / "second", 0.2)

    def overwrite() -> None:
        with open(path / TENSORS, "r+b") as file:  # the same file, not another one of that name
            file.truncate(100) if truncated else file.write((other / TENSORS).read_bytes())

    after_the_check(monkeypatch, overwrite)
    model = make()
    with pytest.raises(ArtifactError, match="was changed while it was read"):
        model.load_adapters(path)
    assert not model.adapters


@pytest.mark.parametrize("when", ["first value", "last value", "prompts"])
def test_a_load_that_fails_late_gives_attached_adapters_their_values_back(
    when: str, tmp_path: Path, monkeypatch: Any
) -> None:
    path = saved(tmp_path / "adapter", 0.1)
    model = make()
    model.add_adapter([LoRA(dim=4), IA3()])
    shake(model, 0.3)
    before, made = values(model), []

    def fail(*args: Any) -> Any:
        raise MemoryError("planted")

    def value(self: Any, tensor: Any) -> Tensor:
        made.append(tensor)
        if len(made) == 1 if when == "first value" else len(made) == len(before):
            return torch.ones(2, 3, 5)  # cannot be copied
        return torch.zeros_like(tensor.value)

    if when == "prompts":
        monkeypatch.setattr(adapters, "prompt_formats", fail)
    else:
        monkeypatch.setattr(artifact_tensors.Contents, "value", value)
    with pytest.raises((MemoryError, RuntimeError)):
        model.load_adapters(path)
    assert equal(values(model), before) and list(model.adapters) == ["lora", "ia3"]


def test_blocks_are_verified_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    data = bytearray(os.urandom(3 * BLOCK + 17))
    file.write_bytes(data)
    held = VerifiedFile(file)
    for start, stop in ((0, 8), (BLOCK - 3, BLOCK + 3), (0, len(data)), (len(data) - 1, len(data)), (5, 5)):
        assert held.read(start, stop) == data[start:stop]
    with pytest.raises(ArtifactError):
        held.read(len(data) - 1, len(data) + 1)
    with open(file, "r+b") as handle:
        handle.seek(2 * BLOCK)
        handle.write(bytes([data[2 * BLOCK] ^ 1]))
    assert held.read(BLOCK, 2 * BLOCK) == data[BLOCK : 2 * BLOCK]
    with pytest.raises(ArtifactError, match="changed while it was read"):
        held.read(2 * BLOCK, 2 * BLOCK + 1)
    held.close()


@pytest.mark.parametrize("index", [slice(None), slice(2, 4), (slice(1, 3), slice(None)), (slice(None), slice(1, 2))])
def test_a_slice_is_that_of_the_tensor(index: Any, tmp_path: Path) -> None:
    whole = torch.randn(5, 3)
    (tmp_path / "file").write_bytes(b"head" + whole.numpy().tobytes())
    held = VerifiedFile(tmp_path / "file")
    assert torch.equal(StoredTensor(held, (5, 3), 4)[index], whole[index])
    held.close()


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    path = saved(tmp_path / "adapter", 0.1)
    other = shutil.copytree(path, tmp_path / "other")
    (other / TENSORS).write_bytes(b"x")
    model, before = make(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ArtifactError):
        model.load_adapters(other)
    model.load_adapters(path)
    assert len(os.listdir("/proc/self/fd")) == before
