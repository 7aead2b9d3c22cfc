"""``nemorun graft merge``: from directories alone, on the real command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork import models
from graftwork.cli.context import GraftContext
from graftwork.cli.merge import merge
from graftwork.errors import MatchError
from graftwork.inference import generate
from graftwork.peft import CanonicalAdapter, LoRA
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory with a base and an adapter of two."""
    make_tiny("llama", tmp_path / "base", vocab_size=300)
    tiny_tokenizer(tmp_path / "base")
    model = models.load(tmp_path / "base")
    model.add_adapter([LoRA(dim=4), CanonicalAdapter(dim=4)])
    shake(model, 0.1)
    model.save_adapters(tmp_path / "adapter")
    return tmp_path


def verb(*words: str) -> None:
    GraftContext(name="merge", skip_confirmation=True).cli_execute(merge, list(words))


def test_a_merged_model_answers_as_base_and_adapter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.load(place / "base")
    model.load_adapters(place / "adapter", names=["lora"])
    model.save_adapters(place / "lora")
    verb(f"adapter={place / 'adapter'}", f"output={place / 'merged'}", f"base={place / 'base'}", "names=['lora']")
    assert f"wrote {place / 'merged'}" in capsys.readouterr().out
    asked = {"prompts": ["a warm film", "a dull film"], "max_new_tokens": 6, "dtype": "fp32"}
    bare, live = (generate(str(place / "base"), adapter=a, **asked) for a in (None, str(place / "lora")))
    merged = generate(str(place / "merged"), **asked)
    assert [a["output"] for a in merged] == [a["output"] for a in live] != [a["output"] for a in bare]


def test_the_dtype_is_said(place: Path) -> None:
    words = f"adapter={place / 'adapter'}", f"base={place / 'base'}", "names=['lora']"
    verb(*words, f"output={place / 'merged'}", "dtype=bf16")
    assert json.loads((place / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_base_is_found_where_the_adapter_says(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is that of its directory; the fingerprint tells that it is the one."""
    monkeypatch.chdir(place)
    merge("adapter", "merged", names=["lora"])
    assert (place / "merged" / "model.safetensors").is_file()
    with pytest.raises(MatchError, match="CanonicalAdapter 'canonical_adapter' cannot be merged"):
        merge("adapter", "other")
    assert not (place / "other").exists()


@pytest.mark.slow
def test_a_refusal_in_the_shell_is_one_line_and_exit_2(place: Path) -> None:
    nemorun = Path(sys.executable).with_name("nemorun")
    words = ["graft", "merge", f"adapter={place / 'adapter'}", f"output={place / 'out'}", "--yes"]
    done = subprocess.run([nemorun, *words], capture_output=True, text=True, cwd=place, stdin=subprocess.DEVNULL)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "CanonicalAdapter 'canonical_adapter' cannot be merged" in lines[0] and not (place / "out").exists()
