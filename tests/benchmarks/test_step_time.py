"""The benchmark runs, compares equal work, and writes its page without touching what surrounds the tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import measure  # noqa: E402
import step_time  # noqa: E402
import table  # noqa: E402
import workload  # noqa: E402

SIDES = ("ours", "peer")


def results() -> dict[str, Any]:
    step = {"case": "lora_fp32", "title": "LoRA", "threads": 1, "ratio": 1.5, "half_of_the_ratios": [1.4, 1.6]}
    for side in SIDES:
        step |= {f"{side}_tokens_per_second": 1234.5, f"{side}_trainable": 1000}
    step["losses"] = {when: dict.fromkeys(SIDES, 9.68) for when in ("first", "last")}
    versions = dict.fromkeys(("torch", "megatron-core", "lightning", "transformers", "peft", "python"), "1")
    return {
        "machine": {"processor": "P", "cores": 2, "bf16_in_hardware": True, "load_at_start": 0.1, **versions},
        "steps": [step],
        "memory": {"lora_fp32": {side: {"imports_mb": 1.0, "ready_mb": 200.0, "peak_mb": 500.0} for side in SIDES}},
        "files": [{"title": "save the adapter", "ours_seconds": 0.02, "peer_seconds": 0.01}],
        "left_out": {},
        "trainer": {"title": "LoRA", "loop_seconds": 0.1, "trainer_seconds": 0.11},
    }


def test_what_cannot_be_measured_is_left_out_and_said_so() -> None:
    measured, left_out = step_time.chosen_cases(None, bf16_in_hardware=False, trl_installed=False)
    assert list(left_out.values()) == ["TRL is not installed", "this processor only emulates bf16"]
    assert len(measured) + 2 == len(workload.CASES)
    assert step_time.chosen_cases(None, True, True) == (workload.CASES, {})
    asked = step_time.chosen_cases(["lora_bf16"], bf16_in_hardware=False, trl_installed=False)
    assert [c.name for c in asked[0]] == ["lora_bf16"] and asked[1] == {}
    said = table.markdown(results() | {"left_out": left_out})
    assert "since this processor only emulates bf16: LoRA on every linear, bf16 base" in said
    assert "emulates" not in table.markdown(results())


def test_only_the_tables_are_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{table.BEGIN}\n\nold\n\n{table.END}\n\nafter\n")
    table.write(results(), page)
    text = page.read_text()
    assert text.startswith("before\n\n" + table.BEGIN) and text.endswith(table.END + "\n\nafter\n")
    assert (
        "old" not in text
        and "**1.50**" in text
        and "300 / 300 MB" in text
        and "9.6800 to" in text
        and "**0.50**" in text
        and "+10.0 %" in text
    )


def test_the_page_has_a_place_for_the_tables() -> None:
    text = table.PAGE.read_text()
    assert text.count(table.BEGIN) == text.count(table.END) == 1


def test_the_mix_has_short_and_long_rows_and_answers_in_the_last_quarter() -> None:
    batch = workload.mix(workload.FULL)
    lengths = [len(row) for row in batch.tokens]
    assert len(lengths) == 32 and min(lengths) < 50 and max(lengths) > 250
    assert 0.2 < batch.target_count / batch.real_tokens < 0.27


def test_a_spell_that_meets_a_whole_round_changes_no_ratio() -> None:
    ours, peer = [1.0, 1.0, 4.0, 1.0, 1.0], [1.1, 1.2, 4.8, 1.2, 1.3]
    assert measure.quartiles(ours, peer) == pytest.approx((1.2, 1.2, 1.2))


def test_dense_rows_have_a_target_everywhere_but_at_the_end() -> None:
    batch = workload.dense(workload.FULL)
    assert batch.target_count == batch.real_tokens - len(batch.tokens)


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "step_time.py"
    options = ["--quick", "--cases", "lora_bf16", "mix_packed", "--output", str(tmp_path / "out.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = table.PAGE.read_text()
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["case"] for row in found["steps"]] == ["lora_bf16", "mix_packed"]
    assert all(row["ratio"] > 0 for row in found["steps"]) and len(found["files"]) == 3
    assert all(found["memory"][c][s]["peak_mb"] > 0 for c in found["memory"] for s in SIDES)
    assert table.PAGE.read_text() == before, "a quick run writes no page"
