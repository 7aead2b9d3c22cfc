"""Damaged, foreign and half-written artifacts: one clear sentence, and model and disk stay as they were."""

import json
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork.errors import ArtifactError, CheckpointError, GraftworkError
from graftwork.models import GPT
from graftwork.peft import CanonicalAdapter, LoRA
from graftwork.peft.artifact import directory as artifact
from tests.contracts.methods import STACKS, make, prompted, shake, tokens
from tests.helpers.tiny_hf import tiny_model

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FC1 = "lora.decoder.layers.1.mlp.linear_fc1.lora_B"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make()
    model.add_adapter(STACKS["all"]())
    shake(model)
    return model.save_adapters(tmp_path_factory.mktemp("artifact") / "adapter")


def forge(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Rewrite an artifact with a checksum that fits, as a careful forger or another version would."""
    tensors, config = load_file(path / TENSORS), json.loads((path / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, path / TENSORS)
    config["checksum"] = artifact._checksum(config, path / TENSORS)
    (path / CONFIG).write_text(json.dumps(config))


def with_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda path: forge(path, lambda tensors, config: change(config))


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda path: forge(path, lambda tensors, config: _discard(change(tensors)))


def _discard(value: Any) -> None:
    """What a change returns does not matter."""


def flip(path: Path) -> None:
    data = bytearray((path / TENSORS).read_bytes())
    data[len(data) // 2] ^= 1
    (path / TENSORS).write_bytes(data)


def edit(path: Path) -> None:
    text = (path / CONFIG).read_text()
    assert '"alpha": 32' in text
    (path / CONFIG).write_text(text.replace('"alpha": 32', '"alpha": 64'))


def truncate(path: Path, forged: bool = False) -> None:
    data = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(data[: len(data) // 2])
    if forged:
        config = json.loads((path / CONFIG).read_text())
        config["checksum"] = artifact._checksum(config, path / TENSORS)
        (path / CONFIG).write_text(json.dumps(config))


def hugging_face(path: Path) -> None:
    shutil.rmtree(path)
    config = peft.LoraConfig(target_modules=["q_proj"], r=4)
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(path)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing directory": (shutil.rmtree, "There is no adapter directory"),
    "missing config": (
        lambda p: (p / CONFIG).unlink(),
        "is not an adapter or incomplete: it holds no adapter_config.json",
    ),
    "missing tensors file": (lambda p: (p / TENSORS).unlink(), "holds no adapter_model.safetensors"),
    "config is no JSON": (lambda p: (p / CONFIG).write_text("{"), "is damaged: it is not valid JSON"),
    "config is a list": (lambda p: (p / CONFIG).write_text("[]"), "is no adapter of graftwork"),
    "truncated": (truncate, "is damaged or was changed: its checksum does not match"),
    "truncated and forged": (lambda p: truncate(p, forged=True), "cannot be read .*truncated"),
    "empty tensors file": (lambda p: (p / TENSORS).write_bytes(b""), "checksum does not match"),
    "flipped bit": (flip, "checksum does not match"),
    "edited config": (edit, "checksum does not match"),
    "newer schema": (with_config(lambda c: c.update(schema=2)), "has schema 2, but this version reads at most 1"),
    "no schema": (with_config(lambda c: c.pop("schema")), "has schema None"),
    "unknown method": (
        with_config(lambda c: c["adapters"][0].update(method="LoRa")),
        r"uses method 'LoRa'; did you mean 'LoRA' or 'DoRA'\?",
    ),
    "unknown option": (
        with_config(lambda c: c["adapters"][0]["hyperparameters"].update(new_option=1)),
        "sets LoRA.new_option, unknown here",
    ),
    "impossible option": (
        with_config(lambda c: c["adapters"][0]["hyperparameters"].update(dim=0)),
        "dim must be a whole number above 0",
    ),
    "Hugging Face adapter of another base": (hugging_face, r"has shape \[4, 48\], but the model needs \[4, 32\]"),
    "unknown tensor": (
        with_tensors(lambda t: t.update({"lora.x": torch.ones(1)})),
        "holds 1 tensors its stack does not have, e.g. 'lora.x'",
    ),
    "tensor of an unknown adapter": (
        with_tensors(lambda t: t.update({"lora2.x": torch.ones(1)})),
        "does not have, e.g. 'lora2.x'",
    ),
    "stray table": (
        with_tensors(lambda t: t.update({"lora.x.table": torch.ones(1)})),
        "does not have, e.g. 'lora.x.table'",
    ),
    "missing tensor": (with_tensors(lambda t: t.pop(FC1)), f"lacks 1 tensors of its stack, e.g. '{FC1}'"),
    "wrong shape": (
        with_tensors(lambda t: t.update({FC1: t[FC1][:-1].contiguous()})),
        rf"Tensor '{FC1}' in .* has shape \[95, 4\], but the model needs \[96, 4\]",
    ),
    "transposed": (
        with_tensors(lambda t: t.update({FC1: t[FC1].T.contiguous()})),
        r"has shape \[4, 96\], but the model needs \[96, 4\]",
    ),
    "NaN": (with_tensors(lambda t: t[FC1].__setitem__((0, 0), float("nan"))), f"'{FC1}' in .* holds NaN or Inf"),
    "Inf": (with_tensors(lambda t: t[FC1].__setitem__((0, 0), float("inf"))), f"'{FC1}' in .* holds NaN or Inf"),
}


def state(model: GPT) -> dict[str, tuple[bool, Tensor]]:
    return {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}


@pytest.mark.fault(
    "unknown tensor keys are accepted",
    "every tensor of the file must belong to a site of its stack",
)
@pytest.mark.fault(
    "missing tensor keys are only warned of, and the module stays at its initial values",
    "a stack is loaded whole or not at all",
)
@pytest.mark.fault(
    "another library's adapter loads with no key matching, and the base answers",
    "an artifact says whose it is and which sites it fills; another format is refused",
)
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_sentence_and_changes_nothing(case: str, attached: bool, good: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    path = shutil.copytree(good, tmp_path / "adapter")
    damage(path)
    model = make()
    if attached:
        model.add_adapter([LoRA(dim=4), CanonicalAdapter("mine", dim=4)])
        shake(model)
        model.train_adapters(["mine"])
    before, layout, logits = state(model), model.prompt_layout, model(tokens())
    with pytest.raises(GraftworkError, match=message) as caught:
        model.load_adapters(path)
    assert "\n" not in str(caught.value)
    after = state(model)
    assert list(after) == list(before) and model.prompt_layout == layout
    assert all(after[n][0] == before[n][0] and torch.equal(after[n][1], before[n][1]) for n in before)
    assert torch.equal(model(tokens()), logits)


def test_after_a_refused_load_the_next_stack_still_freezes_the_base(good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good, tmp_path / "adapter")
    DAMAGE["NaN"][0](path)
    model = make()
    with pytest.raises(ArtifactError):
        model.load_adapters(path)
    model.load_adapters(good)
    assert all(p.requires_grad == (".adapters." in n) for n, p in model.named_parameters())
    assert model(prompted(model, tokens())).isfinite().all()


def test_the_forger_itself_is_sound(good: Path, tmp_path: Path) -> None:
    """Rewriting without a change loads: the refusals above are about the change."""
    path = shutil.copytree(good, tmp_path / "adapter")
    forge(path, lambda tensors, config: None)
    make().load_adapters(path)


@pytest.fixture(params=["mounted", "limited"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A place that holds one small adapter but not a large one: a tiny file system, or a limit on file sizes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if request.param == "mounted" and subprocess.run(mount, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 * 1024, limits[1]))
    yield disk
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_previous_adapter(small_disk: Path) -> None:
    model = make()
    model.add_adapter(LoRA(dim=4))
    shake(model)
    model.save_adapters(small_disk / "adapter")
    files = {p.name: p.read_bytes() for p in (small_disk / "adapter").iterdir()}
    model.add_adapter(LoRA("large", dim=256))
    with pytest.raises(CheckpointError, match="the disk is full|File too large") as caught:
        model.save_adapters(small_disk / "adapter")
    assert "\n" not in str(caught.value) and str(small_disk / "adapter") in str(caught.value)
    assert sorted(p.name for p in small_disk.iterdir()) == ["adapter"]
    assert {p.name: p.read_bytes() for p in (small_disk / "adapter").iterdir()} == files
    twin = make()
    twin.load_adapters(small_disk / "adapter")
    assert list(twin.adapters) == ["lora"]
