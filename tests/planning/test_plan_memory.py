"""Memory as predicted against memory as measured."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory

STORED = json.loads(memory.RESULTS.read_text())


def test_every_run_of_the_grid_was_measured() -> None:
    assert list(STORED) == [cell.name for cell in memory.CELLS]


@pytest.mark.parametrize("cell", memory.CELLS, ids=lambda cell: cell.name)
def test_a_plan_says_what_was_measured(cell: memory.Cell) -> None:
    told = memory.predicted(cell)
    assert told == pytest.approx(STORED[cell.name]["measured"], rel=memory.WORST)
    assert told == pytest.approx(STORED[cell.name]["predicted"], rel=1e-3), "run make bench-memory: the page is old"


@pytest.mark.slow
@pytest.mark.parametrize("cell", memory.CELLS, ids=lambda cell: cell.name)
def test_memory_measured_anew(cell: memory.Cell) -> None:
    assert memory.predicted(cell) == pytest.approx(memory.measured(cell), rel=memory.WORST)


def test_the_table_stands_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{memory.BEGIN}\nold\n{memory.END}\nafter\n")
    monkeypatch.setattr(memory, "RESULTS", tmp_path / "memory.json")
    memory.write({"LoRA": {"predicted": 95e6, "measured": 100e6}}, page)
    text = page.read_text()
    assert "| LoRA | fp32 | 95 MB | 100 MB | -5.0 % |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
