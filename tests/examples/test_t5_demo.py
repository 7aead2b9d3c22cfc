"""The T5 example: two tasks on one base that is trained on the spot; the first task keeps every bit."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from graftwork import parallel

SCRIPT = Path(__file__).parents[2] / "examples" / "t5" / "demo.py"


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(out / "cache"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(out), *options])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        parallel.destroy()


def test_a_short_run_goes_all_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path, "--base-steps", "4", "--steps", "3", "--rows", "4")
    said = capsys.readouterr().out
    assert "deny after ask was learned: every bit as before" in said
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    weights = tmp_path / "base-4" / "model.safetensors"
    assert weights.stat().st_size < 5e6


@pytest.mark.slow
def test_both_tasks_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path)
    figures = {t: (float(a), float(b)) for t, a, b in re.findall(r"(\w+): exact match (\S+) -> (\S+)", _said(capsys))}
    assert set(figures) == {"deny", "ask"}
    assert all(before < 0.05 and after > 0.9 for before, after in figures.values())


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out
