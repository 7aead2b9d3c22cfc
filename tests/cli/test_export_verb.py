"""``nemorun graft export``: from an adapter's directory alone, on the real command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork import models
from graftwork.cli.context import GraftContext
from graftwork.cli.export import export
from graftwork.errors import ConfigError
from graftwork.inference import generate
from graftwork.peft import CanonicalAdapter, LoRA, PromptTuning
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory with a base and an adapter of three."""
    make_tiny("llama", tmp_path / "base", vocab_size=300)
    tiny_tokenizer(tmp_path / "base")
    model = models.load(tmp_path / "base")
    model.add_adapter([LoRA(dim=4), PromptTuning(init="random"), CanonicalAdapter(dim=4)])
    model.save_adapters(tmp_path / "adapter")
    return tmp_path


def verb(*words: str) -> None:
    GraftContext(name="export", skip_confirmation=True).cli_execute(export, list(words))


def test_named_adapters_go_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"adapter={place / 'adapter'}", "names=['lora']"
    verb(*given, f"output={place / 'peft'}")
    verb(*given, f"output={place / 'served'}", "for_=vllm", "base=org/model")
    said = capsys.readouterr().out
    assert f"wrote {place / 'peft'}" in said and f"wrote {place / 'served'}" in said
    ours, served = (json.loads((place / p / "adapter_config.json").read_text()) for p in ("peft", "served"))
    assert (ours["r"], served["r"], ours["base_model_name_or_path"]) == (4, 8, "base")
    assert served["base_model_name_or_path"] == "org/model"


def test_what_went_out_answers_as_what_stayed(place: Path) -> None:
    """``adapter=`` takes a directory of Hugging Face PEFT as it takes ours."""
    model = models.load(place / "base")
    model.add_adapter(LoRA(dim=4))
    shake(model, 0.1)
    model.save_adapters(place / "stays")
    verb(f"adapter={place / 'stays'}", f"output={place / 'went'}")
    asked = {"prompts": ["a warm film", "a dull film"], "max_new_tokens": 6}
    base, *found = (
        [answer["output"] for answer in generate(str(place / "base"), adapter=adapter, **asked)]
        for adapter in (None, str(place / "stays"), str(place / "went"))
    )
    assert found[0] == found[1] != base


def test_a_base_that_is_here_tells_whether_rows_begin_with_bos(place: Path) -> None:
    """The tiny tokenizer adds none: behind BOS is in front of everything."""
    given = f"adapter={place / 'adapter'}", f"output={place / 'out'}", "names=['prompt_tuning']"
    with pytest.raises(ConfigError, match="placement='prefix'"):
        export(str(place / "adapter"), str(place / "out"), names=["prompt_tuning"])
    verb(*given, f"base={place / 'base'}")
    assert (place / "out" / "adapter_config.json").is_file()
    tiny_tokenizer(place / "base", adds_bos=True)
    with pytest.raises(ConfigError, match="placement='prefix'"):
        export(str(place / "adapter"), str(place / "out"), names=["prompt_tuning"], base=str(place / "base"))


@pytest.mark.slow
def test_a_refusal_in_the_shell_is_one_line_and_exit_2(place: Path) -> None:
    nemorun = Path(sys.executable).with_name("nemorun")
    words = ["graft", "export", f"adapter={place / 'adapter'}", f"output={place / 'out'}", "--yes"]
    done = subprocess.run([nemorun, *words], capture_output=True, text=True, cwd=place, stdin=subprocess.DEVNULL)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "CanonicalAdapter 'canonical_adapter' cannot be exported" in lines[0] and not (place / "out").exists()
