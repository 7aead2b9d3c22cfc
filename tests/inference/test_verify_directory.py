"""What carries a proof, and what was made of it, answers one probe alike: here, in transformers with PEFT, merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork import models
from graftwork.cli.context import GraftContext
from graftwork.cli.verify import verify
from graftwork.errors import ArtifactError, ConfigError, GraftworkError
from graftwork.inference.verify import verify_directory
from graftwork.models.merging import merge_directory
from graftwork.peft import IA3, LoRA, PromptTuning, PTuning
from tests.contracts.methods import shake
from tests.helpers import tiny_t5
from tests.helpers.tiny_hf import make_tiny

CLIENTS = ("graftwork", "transformers")


def made(base: Path, root: Path, *transforms: Any) -> Path:
    """Save, export and, of the first, merge these adapters, moved by noise."""
    model = models.load(base)
    model.add_adapter(list(transforms))
    shake(model, 0.05)
    model.eval().save_adapters(root / "adapter")
    model.export_adapters(root / "out")
    return root


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a base, and a stack of two as adapter, as exports and merged."""
    root = tmp_path_factory.mktemp("shelf")
    made(make_tiny("llama", root / "base"), root, LoRA(dim=4, alpha=8), IA3(key_position="pre_norm"))
    merge_directory(root / "adapter", root / "merged", root / "base")
    merge_directory(root / "adapter", root / "narrow", root / "base", dtype="bf16")
    merge_directory(root / "adapter", root / "some", root / "base", names=["lora"])
    return root


def asked(shelf: Path, directory: str, **options: Any) -> Any:
    """Verify a directory of the shelf; the base and ``against`` are of the shelf too."""
    if "against" in options:
        options["against"] = str(shelf / options["against"])
    return verify_directory(shelf / directory, base=str(shelf / "base"), **options)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("directory", "against", "views"),
    [
        ("adapter", "out/lora", [(), ("lora",)]),
        ("adapter", "out/ia3", [(), ("ia3",)]),
        ("adapter", "merged", [("lora", "ia3")]),
        ("adapter", "narrow", [("lora", "ia3")]),
        ("adapter", "some", [("lora",)]),
        ("out/lora", None, [(), ("lora",)]),
        ("out/lora", "some", [("lora",)]),
        ("merged", None, [("lora", "ia3")]),
        ("narrow", None, [("lora", "ia3")]),
    ],
)
def test_one_function_wherever_it_is(directory: str, against: str | None, views: Any, client: str, shelf: Path) -> None:
    found = asked(shelf, directory, client=client, **({} if against is None else {"against": against}))
    assert [row.adapters for row in found.rows] == views and found.ok
    narrow = "narrow" in (directory, against)
    for row in found.rows:
        assert row.difference <= (2e-2 if narrow else 1e-5) and (not row.adapters or row.effect > 0.05)
        assert narrow or row.tolerance == 1e-4


@pytest.mark.parametrize(
    ("directory", "against"), [("merged", "adapter"), ("out/lora", "adapter"), ("some", "out/lora")]
)
def test_and_the_other_way_round(directory: str, against: str, shelf: Path) -> None:
    assert asked(shelf, directory, against=against).ok


def test_another_function_is_told_apart(shelf: Path, tmp_path: Path) -> None:
    model = models.load(shelf / "base")
    model.add_adapter(LoRA(dim=4))
    shake(model, 0.06)
    model.export_adapters(tmp_path / "lora")
    assert not verify_directory(shelf / "adapter", str(shelf / "base"), str(tmp_path / "lora")).ok


@pytest.mark.parametrize("client", CLIENTS)
def test_a_prompt_of_each_task(client: str, tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    prompts = PromptTuning("prompts", placement="before_bos", init="random", tasks={"mood": 2, "topic": 3})
    made(base, tmp_path, prompts)
    for out in (tmp_path / "out" / "prompts" / task for task in ("mood", "topic")):
        for directory, against in ((tmp_path / "adapter", str(out)), (out, None)):
            found = verify_directory(directory, str(base), against, client)
            assert found.ok and found.rows[1].effect > 0.1 and found.rows[1].difference <= 1e-5
    mood = tmp_path / "out" / "prompts" / "mood"
    mood.rename(mood.with_name("else"))
    with pytest.raises(ArtifactError, match="is the prompt of none of the proof's tasks; call its directory one of: m"):
        verify_directory(tmp_path / "adapter", str(base), str(mood.with_name("else")))


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("stack", ["lora", "ptuning"])
def test_t5(stack: str, client: str, tmp_path: Path) -> None:
    tiny_t5.make_t5("t5v11", tmp_path / "base")
    transform = LoRA(dim=4) if stack == "lora" else PTuning(placement="before_bos")
    made(tmp_path / "base", tmp_path, transform)
    found = verify_directory(tmp_path / "adapter", str(tmp_path / "base"), str(tmp_path / "out"), client)
    assert found.ok and len(found.rows) == 2
    if stack == "lora":
        merge_directory(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
        assert verify_directory(tmp_path / "merged", client=client).ok


def scaled(shelf: Path) -> None:
    file = shelf / "out" / "lora" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))


def weights(shelf: Path) -> None:
    file = shelf / "merged" / "model.safetensors"
    held = load_file(file)
    held["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(held, file, {"format": "pt"})


BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "nothing": ({"directory": "nowhere"}, None, "There is no adapter directory"),
    "several": ({"directory": "out"}, None, "no merged model; name one of those inside of it, such as '.*/out/ia3'"),
    "a base": ({"directory": "base"}, None, "carries no proof"),
    "a scale": ({"directory": "out/lora"}, scaled, "is the proof of another adapter"),
    "a weight": ({"directory": "merged"}, weights, "is the proof of another adapter"),
    "a client": ({"directory": "adapter", "client": "vllm"}, None, "client is 'vllm'; valid: graftwork, transformers"),
    "ours there": ({"directory": "adapter", "client": "transformers"}, None, "name that with against=."),
    "another one": ({"directory": "out/ia3", "against": "out/lora"}, None, "is none of the adapters that the proof of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, shelf: Path, tmp_path: Path) -> None:
    given, change, message = BAD[case]
    root = Path(shutil.copytree(shelf, tmp_path / "shelf"))
    if change is not None:
        change(root)
    with pytest.raises(GraftworkError, match=message) as caught:
        asked(root, **given)
    assert "\n" not in str(caught.value)


def test_a_changed_scale_is_told_by_its_logits(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a proof of its own that fits: the adapter's probe, and exit code 1."""
    root = Path(shutil.copytree(shelf, tmp_path / "shelf"))
    scaled(root)
    words = [str(root / "adapter"), f"base={root / 'base'}", f"against={root / 'out' / 'lora'}", "client=transformers"]
    with pytest.raises(SystemExit) as ended:
        GraftContext(name="verify", skip_confirmation=True).cli_execute(verify, words)
    said = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1 and "against lora, in transformers" in said[-4] and said[-1].endswith("differs")


def test_a_proof_says_where_it_was_made(shelf: Path) -> None:
    content = json.loads((shelf / "narrow" / "proof.json").read_text())
    assert (
        content["dtype"] == "fp32" and 1e-4 < content["tolerance"] < 5e-2 and content["artifact"].startswith("sha256:")
    )
    assert torch.tensor(content["views"][1]["values"]).shape == (8, 16)
    with pytest.raises(ConfigError):
        verify_directory(shelf / "merged", client="")
