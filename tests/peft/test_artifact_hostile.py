"""Artifacts made to hurt: refused in one short sentence, before memory or time is spent on them."""

import json
import os
import resource
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.errors import ArtifactError, CheckpointError, ConfigError, GraftworkError
from graftwork.peft import LoRA, PTuning
from graftwork.peft.artifact import directory as artifact
from tests.contracts.methods import STACKS, make, shake

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FC1 = "lora.decoder.layers.1.mlp.linear_fc1.lora_B"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make()
    model.add_adapter(STACKS["lora"]())
    shake(model)
    return model.save_adapters(tmp_path_factory.mktemp("artifact") / "adapter")


def signed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the configuration and sign it again."""
    config = json.loads((path / CONFIG).read_text())
    change(config)
    config["checksum"] = artifact._checksum(config, path / TENSORS)
    (path / CONFIG).write_text(json.dumps(config))


def option(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["adapters"][0]["hyperparameters"].update(values)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "rank above every limit": (
        {"dim": 10**8},
        r"dim must be a whole number above 0, got 100000000 \(at most 16,777,216\)",
    ),
    "rank of hundreds of digits": ({"dim": 10**400}, "dim must be a whole number"),
    "rank that the file does not hold": ({"dim": 10**7}, r"has shape \[4, 32\], but the model needs \[10000000, 32\]"),
    "ranks that the file does not hold": ({"rank_pattern": {"linear_fc1": 10**7}}, "but the model needs"),
    "scale that is not finite": ({"alpha": 1e308}, "alpha must be above 0 and finite in single precision"),
    "scale that vanishes": ({"alpha": 1e-320}, "alpha must be above 0 and finite in single precision"),
    "alpha of a pattern": ({"alpha_pattern": {"linear_fc1": 1e308}}, "finite in single precision"),
    "a fraction for a rank": ({"dim": 4.5}, "dim must be a whole number"),
    "text for a rank": ({"dim": "4"}, r"sets LoRA.dim to '4': Input should be a valid integer"),
    "a list for a rank": ({"dim": [4]}, "sets LoRA.dim"),
    "a number for targets": ({"target_modules": 7}, "sets LoRA.target_modules to 7"),
    "text for targets": ({"target_modules": "linear_fc1"}, "sets LoRA.target_modules to 'linear_fc1'"),
    "numbers for targets": ({"target_modules": [1]}, "sets LoRA.target_modules"),
    "text for a flag": ({"use_rslora": "no"}, "sets LoRA.use_rslora to 'no'"),
    "text for layers": ({"layers": ["0"]}, "sets LoRA.layers"),
    "no name": ({"name": None}, "sets LoRA.name to None"),
    "a name of a million characters": ({"name": "a" * 10**6}, "does not fit"),
    "a target of a million characters": ({"target_modules": ["a" * 10**6]}, "does not fit"),
    "a nested option": ({"target_modules": [["linear_fc1"]]}, "does not fit"),
    "too many targets": ({"target_modules": ["linear_fc1"] * 10**5}, "does not fit"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_refused_before_anything_is_allocated(case: str, good: Path, tmp_path: Path) -> None:
    values, message = OPTIONS[case]
    path, model = shutil.copytree(good, tmp_path / "adapter"), make()
    signed(path, option(**values))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=message) as caught:
        model.load_adapters(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024, "KiB"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert not model.adapters and all(p.requires_grad for p in model.parameters())


def f8(path: Path) -> None:
    tensors = load_file(path / TENSORS)
    tensors[FC1] = tensors[FC1].to(torch.float8_e4m3fn)
    save_file(tensors, path / TENSORS)


def half(path: Path) -> None:
    save_file({k: t.half() for k, t in load_file(path / TENSORS).items()}, path / TENSORS)


def long_name(path: Path) -> None:
    save_file(load_file(path / TENSORS) | {"lora." + "x" * 10**6: torch.ones(1)}, path / TENSORS)


def renamed(key: str, value: Any) -> Callable[[Path], None]:
    return lambda path: signed(path, lambda config: config.update({key: value}))


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor in fp8": (f8, f"Tensor '{FC1}' in .* is stored as 'F8_E4M3'; an adapter's are F32"),
    "tensors in fp16": (half, "is stored as 'F16'"),
    "a tensor's name of a million characters": (long_name, "holds 1 tensors its stack does not have"),
    "adapters that are text": (renamed("adapters", "lora"), "does not fit: 'adapters'"),
    "no adapters": (renamed("adapters", []), "does not fit: 'adapters'"),
    "an adapter that is a list": (renamed("adapters", [["LoRA"]]), "does not fit: 'adapters.0'"),
    "a base that is a list": (renamed("base", []), "does not fit: 'base'"),
    "a schema that is text": (renamed("schema", "1"), "has schema '1'"),
    "a schema that is true": (renamed("schema", True), "has schema True"),
    "a field that nobody knows": (renamed("extra", 1), "does not fit: 'extra'"),
    "an order that is a number": (renamed("stack", 3), "does not fit: 'stack'"),
    "two adapters of one name": (
        lambda path: signed(path, lambda config: config["adapters"].append(config["adapters"][0])),
        "holds two adapters named 'lora'",
    ),
    "a prompt of numbers": (
        lambda path: signed(path, lambda config: config["adapters"][0].update(prompt={"prompt_template": 7})),
        "does not fit: 'adapters.0.prompt.prompt_template",
    ),
    "a shape of lists": (
        lambda path: signed(path, lambda config: config["base"]["shape"].update(hidden_size=["x" * 10**6])),
        "another shape: hidden_size",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_refused(case: str, good: Path, tmp_path: Path) -> None:
    change, message = FILES[case]
    path, model = shutil.copytree(good, tmp_path / "adapter"), make()
    change(path)
    signed(path, lambda config: None)
    with pytest.raises(ArtifactError, match=message) as caught:
        model.load_adapters(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500 and not model.adapters


RAW = {
    "deep": ('{"format": ' + "[" * 100_000, "is nested deeper"),
    "deep and whole": ('{"format": ' + "[" * 100 + "]" * 100 + "}", "is nested deeper"),
    "a number of a million digits": ('{"schema": ' + "1" * 10**6 + "}", "is not valid JSON"),
    "NaN": ('{"format": NaN}', "is not valid JSON"),
    "a key twice": ('{"format": "graftwork", "format": "graftwork"}', "is given twice"),
    "other bytes": ("é".encode("latin-1"), "is not valid JSON"),
}


@pytest.mark.parametrize("case", RAW)
def test_texts_are_refused(case: str, good: Path, tmp_path: Path) -> None:
    text, message = RAW[case]
    path = shutil.copytree(good, tmp_path / "adapter")
    (path / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ArtifactError, match=message) as caught:
        make().load_adapters(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize(
    "kind", ["absolute link", "relative link", "link to nothing", "link to itself", "pipe", "device"]
)
def test_files_elsewhere_are_not_followed(name: str, kind: str, good: Path, tmp_path: Path) -> None:
    path, model = shutil.copytree(good, tmp_path / "adapter"), make()
    shutil.move(path / name, tmp_path / "outside")
    targets = {
        "absolute link": str(tmp_path / "outside"),
        "relative link": "../outside",
        "link to nothing": "nothing",
        "link to itself": name,
        "device": "/dev/zero",
    }
    if kind == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to(targets[kind])
    with pytest.raises(ArtifactError) as caught:
        model.load_adapters(path)
    assert "\n" not in str(caught.value) and not model.adapters


def test_links_inside_and_to_the_directory_are_followed(good: Path, tmp_path: Path) -> None:
    path, model = shutil.copytree(good, tmp_path / "adapter"), make()
    (path / TENSORS).rename(path / "really")
    (path / TENSORS).symlink_to("really")
    (tmp_path / "link").symlink_to("adapter")
    model.load_adapters(tmp_path / "link")
    assert list(model.adapters) == ["lora"]


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/dev/null", "", "/proc/self/mem/x"])
def test_strange_paths(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make()
    with pytest.raises(GraftworkError) as caught:
        model.load_adapters(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    model.add_adapter(LoRA(dim=4))
    if path:
        with pytest.raises((ArtifactError, CheckpointError)) as caught:
            model.save_adapters(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_what_loading_would_refuse_is_not_saved(tmp_path: Path) -> None:
    model = make()
    model.add_adapter(PTuning("n" * 300, virtual_tokens=2, embedding_dim=4, bottleneck_dim=4))
    with pytest.raises(ArtifactError, match="not saved .* does not fit"):
        model.save_adapters(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="finite in single precision"):
        LoRA(alpha=float("inf"))  # type: ignore[arg-type]


def test_reading_holds_one_block_beside_its_own_values(tmp_path: Path) -> None:
    """Whatever the file's size: the values of the adapter and a few blocks are in memory, not the file thrice."""
    model = make()
    model.add_adapter(PTuning(virtual_tokens=2, embedding_dim=3000, bottleneck_dim=3000))
    path = model.save_adapters(tmp_path / "adapter")
    size = (path / TENSORS).stat().st_size
    tracemalloc.start()
    with artifact.opened(path):
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 32 * 2**20 and peak < 10 * 2**20
