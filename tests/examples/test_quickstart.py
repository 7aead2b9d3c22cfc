"""The script that readers start from."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork import parallel
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "quickstart.py"


def run_script(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        parallel.destroy()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = make_tiny("llama", tmp_path / "base", vocab_size=300, max_position_embeddings=512)
    tiny_tokenizer(directory)
    return directory


def test_the_script_trains_loads_and_predicts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    run_script(monkeypatch, "--base", str(base), "--steps", "3", "--out", str(out))
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert [a["method"] for a in config["adapters"]] == ["PTuning", "CanonicalAdapter"]
    assert "held-out rows answered exactly" in capsys.readouterr().out


def test_the_script_names_a_wrong_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="error: 'smolm2_135m' is no checkpoint"):
        run_script(monkeypatch, "--base", "smolm2_135m", "--out", str(tmp_path))


@pytest.mark.slow
def test_the_script_learns_on_the_pretrained_model(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    right, _, total = done.stdout.splitlines()[-1].split()[:3]
    assert int(right) > 0.8 * int(total), done.stdout
