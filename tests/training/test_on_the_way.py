"""What a run shows and does while it lasts: answers to validation rows, an early end, loggers by name, no adverts."""

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from graftwork.errors import ConfigError
from graftwork.peft import LoRA, PTuning
from graftwork.training import adverts, finetune
from graftwork.training.callbacks.samples import MOST_MOMENTS, Shown, _bounded
from tests.helpers import tiny_run
from tests.helpers.distributed import run_ranks

STACKS: dict[str, Any] = {
    "lora": lambda: [LoRA(dim=4)],
    "both": lambda: [LoRA(dim=4), PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8)],
    "full": list,
}
"""Of ``both`` a later pipeline stage trains only a part."""
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


def trained(data: Path, root: Path, ranks: int = 1, layout: dict[str, int] | None = None, **options: Any) -> list[Any]:
    """Train four steps with two validations and return what ``samples.jsonl`` holds."""
    settings = {"max_steps": 4, "val_check_interval": 2} | options.pop("trainer", {})
    given = {"samples": 2, "peft": STACKS["lora"](), "optim": tiny_run.optim()} | options
    trainer = tiny_run.trainer(root, ranks, layout, **settings)
    finetune(tiny_run.model(), trainer, tiny_run.data_module(data), **given)
    path = root / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def norms(run: Path) -> dict[str, list[float]]:
    """Gradient norms by step, of the whole and of each adapter, as the run has logged them."""
    (metrics,) = (run / "logs").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(metrics.read_text().splitlines()) if row["grad_norm"]]
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name.startswith("grad_norm")}


def on_ranks(rank: int, world_size: int, data: Path, root: Path) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(rank)
    return {
        name: trained(data, root / name, world_size, layout, peft=STACKS["both"]()) for name, layout in LAYOUTS.items()
    }


@pytest.mark.parametrize("peft", ["both", "full"])
def test_the_same_rows_are_answered_before_while_and_after(
    peft: str, tiny_data: Path, tmp_path: Path, capsys: Any
) -> None:
    shown = trained(tiny_data, tmp_path, peft=STACKS[peft]())
    assert [one["step"] for one in shown] == [0, 0, 2, 2, 4, 4]
    held_out: list[Any] = [row for _, row in tiny_run.data_module(tiny_data).raw_rows("validation")]
    right = {row["input"]: row["output"] for row in held_out}
    assert all(right.get(one["input"]) == one["expected"] for one in shown), "they are validation rows"
    said = [line for line in capsys.readouterr().out.splitlines() if "(right: " in line]
    assert len(said) == 4 and repr(shown[0]["input"]) in said[0], "those before the first step are only written down"


@pytest.mark.processes
def test_every_layout_gives_one_rank_s_answers_and_norms(tiny_data: Path, tmp_path: Path) -> None:
    alone = trained(tiny_data, tmp_path / "one", peft=STACKS["both"]())
    for found in run_ranks(on_ranks, 2, tiny_data, tmp_path):
        assert found == dict.fromkeys(LAYOUTS, alone)
    wanted = norms(tmp_path / "one")
    assert set(wanted) == {"grad_norm", "grad_norm/lora", "grad_norm/ptuning"} and len(wanted["grad_norm"]) == 4
    for layout in LAYOUTS:
        found = norms(tmp_path / layout)
        assert set(found) == set(wanted)
        assert all(found[name] == pytest.approx(wanted[name], rel=1e-4) for name in wanted)


def test_asking_changes_nothing_of_the_training(tiny_data: Path, tmp_path: Path) -> None:
    for name, count in (("asked", 2), ("not", 0)):
        trained(tiny_data, tmp_path / name, samples=count, peft=[LoRA(dim=4, dropout=0.1)])
    asked, plain = (next((tmp_path / name / "adapter").glob("*.safetensors")).read_bytes() for name in ("asked", "not"))
    assert asked == plain


def test_long_runs_keep_the_first_moment_and_the_last() -> None:
    kept = _bounded([Shown(step, "a", "b", "c") for step in range(0, 1000, 10)])
    assert len(kept) == MOST_MOMENTS and kept[0].step == 0 and kept[-1].step == 990 and kept[1].step > 500


def test_a_run_that_stops_to_improve_ends_and_stays_ended(tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    settings: dict[str, Any] = {"trainer": {"max_steps": 8, "val_check_interval": 1}, "samples": 0}
    settings |= {"optim": tiny_run.optim(lr=1e-12, warmup_steps=0), "early_stopping": 2}
    steps = []
    for again in (False, True):
        trained(tiny_data, tmp_path, **settings)
        steps.append(json.loads((tmp_path / "summary.json").read_text())["steps"])
        told = capsys.readouterr().out
        assert "stopped early, val_loss has not fallen for 2 validations" in told and ("resuming" in told) == again
    assert steps[0] == steps[1] < 8, "started again it trains nothing more"


def test_early_stopping_needs_patience_and_validation(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="early_stopping=0 must be at least 1"):
        trained(tiny_data, tmp_path, early_stopping=0)
    with pytest.raises(ConfigError, match="needs validation: set data.validation"):
        trained(tiny_data, tmp_path, early_stopping=1, trainer={"limit_val_batches": 0})


@pytest.mark.parametrize(
    ("names", "words"), [(["tensorbord"], "did you mean 'tensorboard'"), (["wandb"], "pip install wandb, or choose of")]
)
def test_unknown_and_missing_loggers_are_refused(
    names: list[str], words: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftwork.training.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        trained(tiny_data, tmp_path, loggers=names)
    assert not (tmp_path / "logs").exists()


def test_csv_is_always_there_and_tensorboard_unless_others_are_named(tiny_data: Path, tmp_path: Path) -> None:
    for name, loggers, suffixes in (("default", None, {".csv", ".yaml", "events"}), ("none", [], {".csv"})):
        trained(tiny_data, tmp_path / name, samples=0, loggers=loggers)
        files = [path.name for path in (tmp_path / name / "logs").rglob("*") if path.is_file()]
        assert {"events" if file.startswith("events") else Path(file).suffix for file in files} == suffixes


def test_adverts_stay_out_of_the_log_and_what_is_said_of_the_run_stays(caplog: pytest.LogCaptureFixture) -> None:
    for name in adverts.SPOKEN_BY:
        speaker = logging.getLogger(name)
        with caplog.at_level(logging.INFO, name):
            speaker.info("💡 Tip: buy this")
            speaker.info("GPU available: False")
    assert caplog.messages == ["GPU available: False"] * 2
