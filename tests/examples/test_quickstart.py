"""The script and the notebook that readers start from."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftwork import parallel
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "quickstart.py"
NOTEBOOK = ROOT / "examples" / "notebooks" / "first_steps.ipynb"


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


def cells(*, with_slow: bool) -> list[str]:
    document: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    assert all(not cell.get("outputs") for cell in document["cells"]), "clear the outputs before committing"
    code = [c for c in document["cells"] if c["cell_type"] == "code"]
    tags = [set(c["metadata"].get("tags", ())) for c in code]
    runnable = [c for c, t in zip(code, tags) if "ipython" not in t and (with_slow or "slow" not in t)]
    return ["".join(c["source"]) for c in runnable]


def test_the_notebook_configures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for source in cells(with_slow=False):
        exec(source, namespace)
    assert namespace["recipe"].trainer.max_steps == 30 and (tmp_path / "reviews.jsonl").exists()


@pytest.mark.slow
def test_the_notebook_runs_on_the_pretrained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for source in cells(with_slow=True):
        exec(source, namespace)
    parallel.destroy()
    assert (tmp_path / "runs/first_steps/loss.png").exists()
    assert namespace["after"]["accuracy"] > namespace["before"]["accuracy"]
