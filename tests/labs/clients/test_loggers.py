"""A run's figures in wandb's and mlflow's own files, written without a network."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_run
from tests.helpers.snippets import ROOT

SCRIPT = """
import sys
sys.path.append(sys.argv[1])  # behind: the versions of the environment win
from pathlib import Path
from graftwork.peft import LoRA
from graftwork.training import finetune
from tests.helpers import tiny_run

data, run = Path(sys.argv[2]), Path(sys.argv[3])
trainer = tiny_run.trainer(run, max_steps=4, val_check_interval=2)
options = {"samples": 0, "loggers": ["wandb", "mlflow"]}
finetune(tiny_run.model(), trainer, tiny_run.data_module(data), [LoRA(dim=4)], tiny_run.optim(), **options)

from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{run}/logs/mlflow.db")
(done,) = client.search_runs([client.get_experiment_by_name("graftwork").experiment_id])
print(done.info.run_name, done.info.status)
print(*(f"{m.step} {m.value}" for m in client.get_metric_history(done.info.run_id, "train_loss")), sep=",")
"""


def started(loggers: Path, data: Path, run: Path, **surroundings: str) -> "subprocess.CompletedProcess[str]":
    """Run the script without whatever account this machine may have."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(loggers), str(data), str(run)],
        capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        env={**own, "PYTHONPATH": str(ROOT), "HOME": str(data), "WANDB_SILENT": "true", **surroundings},
    )  # fmt: skip


@pytest.mark.slow
def test_without_an_account_wandb_is_refused_in_one_sentence(loggers: Path, tmp_path: Path) -> None:
    done = started(loggers, tiny_run.write_data(tmp_path), tmp_path / "run")
    told = done.stderr.splitlines()[-1]
    assert done.returncode and "ConfigError: wandb does not take this run (No API key configured" in told
    assert told.endswith("keep its figures here with WANDB_MODE=offline.")


@pytest.mark.slow
def test_wandb_and_mlflow_hold_what_the_csv_holds(loggers: Path, tmp_path: Path) -> None:
    data, run = tiny_run.write_data(tmp_path), tmp_path / "run"
    done = started(loggers, data, run, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr[-3000:]
    status, losses = done.stdout.splitlines()[-2:]
    assert status == "run FINISHED"
    (metrics,) = (run / "logs").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(metrics.read_text().splitlines()) if row["train_loss"]]
    found = [(int(step), float(value)) for step, value in (one.split() for one in losses.split(","))]
    assert found == [(int(row["step"]), pytest.approx(float(row["train_loss"]))) for row in rows] and len(rows) == 4
    (written,) = (run / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train_loss" in written.read_bytes() and b"val_loss" in written.read_bytes()
