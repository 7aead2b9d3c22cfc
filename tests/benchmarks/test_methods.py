"""The table of the methods on real data: means over seeds, written between its markers."""

import sys
from pathlib import Path
from typing import Any

import pytest

from graftwork.peft import METHODS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import methods


def result(exact_match: float) -> dict[str, Any]:
    return {
        "lr": [2e-4, 1e-2],
        "trainable_parameters": 1234,
        "artifact_bytes": 1_500_000,
        "cpu_seconds_per_step": 2.0,
        "loss": 0.5,
        "exact_match": exact_match,
        "accuracy": 0.75,
    }


RESULTS: dict[str, Any] = {
    "steps": 60,
    "rows": 200,
    "base": {"loss": 7.5, "exact_match": 0.0, "accuracy": 0.72},
    "stacks": {"LoRA + IA3": {"1": result(0.9), "2": result(0.8)}},
}


def test_every_stack_is_made_of_methods_and_every_method_is_in_one() -> None:
    made = {type(transform) for stack in methods.STACKS.values() for transform in stack()}
    assert made == set(METHODS.values())


def test_figures_are_means_with_their_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{methods.BEGIN}\nold\n{methods.END}\nafter\n")
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "methods.json")
    methods.write(RESULTS, page)
    text = page.read_text()
    line = "| LoRA + IA3 | 0.0002, 0.01 | 1,234 | 1.50 MB | 2 | 85.0 ± 7.1 % | 75.0 ± 0.0 % | 0.500 ± 0.000 | 64 |"
    assert line in text and "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    methods.write(RESULTS, page)
    assert page.read_text() == text


def test_what_was_measured_is_kept_for_as_many_steps_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "methods.json")
    assert methods.kept(60, 200) == {"steps": 60, "rows": 200, "stacks": {}}
    page = tmp_path / "page.md"
    page.write_text(f"{methods.BEGIN}\n{methods.END}")
    methods.write(RESULTS, page)
    assert methods.kept(60, 200) == RESULTS
    assert methods.kept(80, 200) == {"steps": 80, "rows": 200, "stacks": {}}
