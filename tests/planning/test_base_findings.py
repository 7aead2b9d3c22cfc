"""What is said of a base before a run: ``resolve`` and the model that then load it are the oracle."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from graftwork.errors import CheckpointError, ConfigError
from graftwork.models import GPT
from graftwork.models.shapes import Shape
from graftwork.models.weights import read_config, shape_from_hf
from graftwork.models.weights.hub import resolve
from graftwork.planning.base import look_at_base
from graftwork.planning.problem import Problem
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_hf import make_tiny


@pytest.fixture(autouse=True)
def private_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path / "hf")


def shape_of(directory: Path) -> Shape:
    return shape_from_hf(read_config(directory))


def files_of(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_checkpoint_directory(tmp_path: Path, family: str) -> None:
    directory = make_tiny(family, tmp_path / "hf")
    before = files_of(tmp_path)
    found, problems = look_at_base(str(directory), shape_of(directory), "fp32")
    tensors = load_file(directory / "model.safetensors")
    assert not problems and not found.notes and found.directory == str(directory)
    assert found.family == family and found.size_bytes == (directory / "model.safetensors").stat().st_size
    assert found.formats == (("F32", len(tensors)),)
    assert files_of(tmp_path) == before, "nothing is written"


def test_formats_are_counted(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    narrow = {name: t.bfloat16() if "proj" in name else t for name, t in tensors.items()}
    save_file(narrow, checkpoint / "model.safetensors")
    found, _ = look_at_base(str(checkpoint), shape_of(checkpoint), "bf16")
    wide = sum("proj" not in name for name in tensors)
    assert dict(found.formats) == {"BF16": len(tensors) - wide, "F32": wide}


def test_another_shape_is_told_as_the_model_would(checkpoint: Path) -> None:
    shape = replace(shape_of(checkpoint), num_layers=5)
    _, problems = look_at_base(str(checkpoint), shape)
    with pytest.raises(CheckpointError) as raised:
        GPT(shape, checkpoint=str(checkpoint)).configure_model()
    assert problems == [Problem("model.checkpoint", str(raised.value))] and "num_layers=5 (there 4)" in str(
        raised.value
    )


def test_damage_is_one_problem(checkpoint: Path) -> None:
    shape, file = shape_of(checkpoint), checkpoint / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if "layers.2.mlp" not in name}, file)
    _, problems = look_at_base(str(checkpoint), shape)
    assert [p.field for p in problems] == ["model.checkpoint"] and "3 tensor(s) missing" in problems[0].message
    file.write_bytes(file.read_bytes()[:500])
    _, problems = look_at_base(str(checkpoint), shape)
    assert [p.field for p in problems] == ["model.checkpoint"] and "damaged or incomplete" in problems[0].message


@pytest.mark.parametrize("name", ["smollm2", "/no/such/directory", "missing.gguf", "bad name/with space"])
def test_what_is_no_checkpoint(name: str, checkpoint: Path) -> None:
    _, problems = look_at_base(name, shape_of(checkpoint))
    with pytest.raises(CheckpointError) as raised:
        resolve(name)
    assert problems == [Problem("model.checkpoint", str(raised.value))]


def test_a_dtype_that_cannot_be(checkpoint: Path) -> None:
    shape = shape_of(checkpoint)
    _, problems = look_at_base(str(checkpoint), shape, "fp61")
    assert [p.field for p in problems] == ["model.dtype"] and "did you mean" in problems[0].message
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    _, problems = look_at_base(str(checkpoint), shape, None)
    with pytest.raises(ConfigError) as raised:
        GPT(shape, checkpoint=str(checkpoint)).configure_model()
    assert problems == [Problem("model.dtype", str(raised.value))]


def test_a_gguf_file_is_not_converted(tmp_path: Path, checkpoint: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", checkpoint)
    shape = shape_of(checkpoint)
    before = files_of(tmp_path)
    found, problems = look_at_base(str(file), shape, "bf16")
    assert not problems and found.directory is None and found.family == "llama"
    assert files_of(tmp_path) == before and "the first run converts tiny.gguf into" in found.notes[0]
    _, problems = look_at_base(str(file), replace(shape, ffn_hidden_size=96))
    assert [p.field for p in problems] == ["model.checkpoint"] and "ffn_hidden_size=96 (there 80)" in problems[
        0
    ].message
    directory = resolve(file)
    assert str(directory) in found.notes[0]
    found, problems = look_at_base(str(file), shape, "bf16")
    assert not problems and not found.notes and found.directory == str(directory) and found.formats[0][0] == "BF16"


def test_a_hub_model_is_not_downloaded(tmp_path: Path, checkpoint: Path) -> None:
    found, problems = look_at_base("owner/tiny", shape_of(checkpoint), "bf16")
    assert not problems and found.directory is None and "hf download owner/tiny" in found.notes[0]
    assert not [path for path in files_of(tmp_path / "hub") if path.is_file()]
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(checkpoint, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    found, problems = look_at_base("owner/tiny", shape_of(checkpoint), "bf16")
    assert not problems and not found.notes and found.directory == str(snapshot)


def test_a_disk_without_room(checkpoint: Path) -> None:
    huge = replace(shape_of(checkpoint), num_layers=10**9)
    _, problems = look_at_base("owner/huge", huge, "bf16")
    assert [p.field for p in problems] == ["model.checkpoint"] and "GB free, but" in problems[0].message


def test_random_weights(checkpoint: Path) -> None:
    found, problems = look_at_base(None, shape_of(checkpoint), "bf16")
    assert not problems and found.name is None and "random" in found.notes[0]
