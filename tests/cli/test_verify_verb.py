"""``nemorun graft verify``: the same base, another one, a probe that was tampered with, an artifact without a proof."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftwork import models
from graftwork.cli.context import GraftContext
from graftwork.cli.verify import verify
from graftwork.peft import CanonicalAdapter, LoRA
from graftwork.peft.artifact.proof import Proof, sealed
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import make_tiny


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory with a base and an adapter of two."""
    model = models.load(make_tiny("llama", tmp_path / "base"))
    model.add_adapter([LoRA(dim=4), CanonicalAdapter(dim=4)])
    shake(model, 0.1)
    model.save_adapters(tmp_path / "adapter")
    return tmp_path


def verb(place: Path, *words: str) -> int:
    """Run the verb; return its exit code."""
    try:
        given = [str(place / "adapter"), *(words or (f"base={place / 'base'}",))]
        GraftContext(name="verify", skip_confirmation=True).cli_execute(verify, given)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_proof_is_run_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(place) == 0
    said = capsys.readouterr().out
    for row in ("the base ", "lora + canonical_adapter ", "lora ", "canonical_adapter "):
        line = next(line for line in said.splitlines() if line.startswith(row))
        assert line.endswith("ok, every bit") and "0.0e+00" in line, said
    assert verb(place, f"base={place / 'base'}", "dtype=bf16") == 1, "another arithmetic is told apart"
    assert "differs" in capsys.readouterr().out


def test_another_base_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny("llama", place / "other", seed=5)
    assert verb(place, f"base={place / 'other'}") == 2
    assert "weights differ from this base" in capsys.readouterr().err
    assert verb(place, f"base={place / 'nowhere'}") == 2


def changed(place: Path, change: Any, seal: bool) -> None:
    """Change the proof on the disk, and make its checksum fit where it is to be ``seal``ed again."""
    file = place / "adapter" / "proof.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(sealed(Proof.model_validate(content)) if seal else json.dumps(content))


def token(content: Any) -> None:
    content["probe"]["prompts"][0][3] = (content["probe"]["prompts"][0][3] + 1) % 101


def value(content: Any) -> None:
    content["views"][2]["values"][1][2] += 0.01 * content["views"][2]["scale"]


@pytest.mark.parametrize("change", [token, value])
def test_a_probe_that_was_tampered_with(change: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(place, change, seal=False)
    assert verb(place) == 2 and "checksum does not match" in capsys.readouterr().err
    changed(place, lambda content: None, seal=True)
    assert verb(place) == 1, "a seal that fits does not make the logits fit"
    rows = [line for line in capsys.readouterr().out.splitlines() if "e-" in line or "e+" in line]
    wrong = [line for line in rows if line.endswith("differs")]
    assert len(rows) == 4 and len(wrong) == (4 if change is token else 1)


def lacks(content: Any) -> None:
    del content["views"][1]["values"][0]


def beyond(content: Any) -> None:
    content["probe"]["answers"][0][0] = 101


def stranger(content: Any) -> None:
    content["views"][1]["adapters"] = ["stranger"]


def others(content: Any) -> None:
    content["artifact"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lacks, "does not fit together"),
        (beyond, "token id 101"),
        (stranger, "no adapter 'stranger'"),
        (others, "another adapter"),
    ],
)
def test_a_proof_that_fits_nothing_is_one_sentence(
    change: Any, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(place, change, seal=True)
    assert verb(place) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1


def test_an_artifact_without_a_proof_is_told_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "adapter" / "proof.json").unlink()
    assert verb(place) == 2
    assert "carries no proof" in capsys.readouterr().err
    (place / "adapter" / "proof.json").write_text("[" * 100)
    assert verb(place) == 2
    models.load(place / "base").load_adapters(place / "adapter")  # loading reads no proof


@pytest.mark.slow
def test_in_the_shell(place: Path) -> None:
    nemorun = Path(sys.executable).with_name("nemorun")
    words = ["graft", "verify", str(place / "adapter"), f"base={place / 'base'}", "--yes"]
    done = subprocess.run([nemorun, *words], capture_output=True, text=True, cwd=place, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stdout.count("ok, every bit") == 4, done.stderr
