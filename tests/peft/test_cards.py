"""The card beside every adapter, export and merged model: a header that the hub reads, lines that load it."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from graftwork import models
from graftwork.cli.context import GraftContext
from graftwork.cli.export import export
from graftwork.models.base import Model
from graftwork.models.cards import retell
from graftwork.models.merging import Blend, combine_directories, merge_directory
from graftwork.peft import IA3, PEFT, CanonicalAdapter, LoRA, PromptTuning
from graftwork.peft.artifact.card import DataFile, Told, card, code, fenced, table
from graftwork.peft.artifact.directory import read_everywhere
from tests.contracts.methods import make, shake
from tests.helpers import tiny_t5
from tests.helpers.tiny_hf import make_tiny

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def trained(root: Path, *transforms: PEFT) -> Model:
    """Return a model of a base called ``base`` with adapters that do something."""
    model = models.load(make_tiny("llama", root / "base"))
    model.add_adapter(list(transforms))
    shake(model, 0.05)
    return model.eval()


def read(directory: Path) -> tuple[dict[str, Any], str]:
    """Return header and text of a card, as the hub's own reader finds them."""
    found = ModelCard.load(directory / "README.md")
    return found.data.to_dict(), found.text


def run(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run every line of a card but those that start vLLM, from the directory that its own stands in."""
    monkeypatch.chdir(directory.parent)
    names: dict[str, Any] = {}
    for language, lines in BLOCK.findall((directory / "README.md").read_text()):
        if language == "python":
            exec(lines, names)
        elif not lines.startswith("vllm serve "):
            program, tool, verb, *words = shlex.split(lines)
            assert (program, tool, verb) == ("nemorun", "graft", "export")
            GraftContext(name="export", skip_confirmation=True).cli_execute(export, words)
    return names


def test_the_card_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path, LoRA(dim=4), IA3(key_position="pre_norm"), CanonicalAdapter(dim=4))
    told = Told([DataFile("train", "rows.jsonl", "a" * 64)], {"exact_match": {"before": 0.25, "after": 0.75}})
    model.save_adapters(tmp_path / "adapter", step=7, told=told)
    header, text = read(tmp_path / "adapter")
    assert header["base_model"] == "base" and header["base_model_relation"] == "adapter"
    assert header["tags"] == ["peft", "canonicaladapter", "ia3", "lora"] and "license" not in header
    assert (header["library_name"], header["pipeline_tag"]) == ("graftwork", "text-generation")
    for said in (
        f"fingerprint `{read_everywhere(tmp_path / 'adapter').base.fingerprint}`",
        "LoRA(name='lora', dim=4",
        "trained for 7 steps",
        f"| train | `rows.jsonl` | `{'a' * 64}` |",
        "| `exact_match` | 0.25 | 0.75 |",
        "| `lora + ia3 + canonical_adapter` |",
        "| `ia3` |",
        "--max-lora-rank 8 --lora-modules lora=vllm-lora",
    ):
        assert said in text, said
    assert 'export adapter=adapter output=peft-lora "names=[' in text and "vllm-ia3" not in text
    assert "canonical_adapter'" not in text.partition("## Load it")[2], "no way that does not work"
    names = run(tmp_path / "adapter", monkeypatch)
    assert isinstance(names["model"], torch.nn.Module) and (tmp_path / "vllm-lora" / "proof.json").is_file()
    assert (tmp_path / "peft-ia3" / "proof.json").is_file()


@pytest.mark.parametrize("for_", ["peft", "vllm"])
def test_the_card_of_an_export(for_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path, LoRA(dim=4))
    model.export_adapters(tmp_path / "out", for_=for_)
    header, text = read(tmp_path / "out")
    assert (header["library_name"], header["base_model"]) == ("peft", "base")
    assert ("vllm serve base --enable-lora --max-lora-rank 8 --lora-modules lora=out" in text) == (for_ == "vllm")
    assert "| `lora` |" in text and "target_modules=" in text
    theirs = run(tmp_path / "out", monkeypatch)["model"]
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() <= 1e-4 * model(ids).abs().max()


def test_the_card_of_a_merged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path, LoRA(dim=4))
    model.save_adapters(tmp_path / "adapter")
    merge_directory(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    header, text = read(tmp_path / "merged")
    assert (header["library_name"], header["base_model_relation"]) == ("transformers", "finetune")
    assert "LoRA(name=" in text and "vllm serve merged" in text and "| `lora` |" in text
    theirs, ids = run(tmp_path / "merged", monkeypatch)["model"], torch.arange(1, 9)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() <= 1e-4 * model(ids).abs().max()


def test_t5_has_its_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_t5.make_t5("t5v11", tmp_path / "base")
    model = models.load(tmp_path / "base")
    model.add_adapter(LoRA(dim=4))
    shake(model, 0.05)
    model.save_adapters(tmp_path / "adapter")
    header, text = read(tmp_path / "adapter")
    assert header["pipeline_tag"] == "text2text-generation" and "AutoModelForSeq2SeqLM" in text
    assert "vllm serve" not in text and "it has no encoder-decoder" in text
    run(tmp_path / "adapter", monkeypatch)


def test_what_was_not_verified_says_so(tmp_path: Path) -> None:
    model = make()
    model.add_adapter(PromptTuning(init="random"))
    model.save_adapters(tmp_path / "adapter", verify=False)
    header, text = read(tmp_path / "adapter")
    assert "base_model" not in header and "None: what was written was not read back" in text
    assert "random weights, which no checkpoint holds" in text and "```" not in text


def test_a_card_is_told_anew_and_loading_never_reads_it(tmp_path: Path) -> None:
    model = trained(tmp_path, LoRA(dim=4))
    model.save_adapters(tmp_path / "adapter")
    others = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir() if p.name != "README.md"}
    before = (tmp_path / "adapter" / "README.md").read_text()
    retell(tmp_path / "adapter", Told(metrics={"loss": {"after": 1.5}}))
    after = (tmp_path / "adapter" / "README.md").read_text()
    assert "| `loss` |  | 1.5 |" in after and after.replace("## Metrics", "") != before
    assert after.partition("## Proof")[2] == before.partition("## Proof")[2]
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir() if p.name != "README.md"} == others
    (tmp_path / "adapter" / "README.md").write_bytes(b"\xff---")
    model.load_adapters(tmp_path / "adapter")


def test_a_combination_has_one(tmp_path: Path) -> None:
    trained(tmp_path, LoRA(dim=4)).save_adapters(tmp_path / "adapter")
    combine_directories([tmp_path / "adapter"] * 2, tmp_path / "both", Blend([1, 1], name="both"), tmp_path / "base")
    assert "| `both` |" in read(tmp_path / "both")[1] and "--lora-modules both=" in read(tmp_path / "both")[1]


HOSTILE = [
    "a: b",
    '"]\nlicense: evil',
    "--- \n---",
    "`x` ``y`` | z",
    "```\n</code><script>",
    "\u2028\x00\x1b[31m",
    "café \U0001f600",
    "\ud800",
    "- [x](javascript:1)",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_of_others_stay_what_they_are(text: str) -> None:
    made = card({"base_model": text, "tags": [text]}, code(text), [])
    made.encode("utf-8", "surrogatepass")
    header = yaml.safe_load(made.split("\n---\n")[0].removeprefix("---\n"))
    assert header == {"base_model": text, "tags": [text]}
    line = table(["x"], [[code(text)]]).splitlines()[2]
    assert line.count("|") - line.count("\\|") == 2 and line.isprintable()
    assert re.fullmatch(r"(`+)(?!`).*(?<!`)\1", code(text)), "one span of code, whatever is in it"
    block = fenced("python", text)
    fence = block[: len(block) - len(block.lstrip("`"))]
    assert block.endswith("\n" + fence) and fence not in text


def test_a_base_with_a_hostile_name(tmp_path: Path) -> None:
    name = "b` | $(x) '\"] - {\u00e9"
    model = models.load(make_tiny("llama", tmp_path / name))
    model.add_adapter(LoRA(dim=4))
    model.save_adapters(tmp_path / "adapter")
    model.export_adapters(tmp_path / "out")
    for place in ("adapter", "out"):
        header, text = read(tmp_path / place)
        assert header["base_model"] == name and json.dumps(header)
        assert "\n# " in text and text.count("## Load it") == 1
