"""A sweep on a real Slurm is one job array: followed, with its failures, cancelled, and gone on with."""

import re
import subprocess
import sys
import time
from pathlib import Path

import nemo_run as run
import pytest

from graftwork.executors import slurm
from tests.helpers.sweeps import Place, Rate, learn
from tests.labs.slurm.lab import SlurmLab, wait_until

SAID = "train.jsonl, line 3: field 'output' is missing; valid: input, output."

SCRIPT = """
from pathlib import Path
from graftwork.executors import sweep
from graftwork.recipes import grid
from tests.labs.slurm.test_array_sweep import executor, recipe
recipes = grid(recipe(Path({root!r}), {recipe}), {axes!r})
sweep(recipes, executor({executor}), {sweep})
"""


def recipe(root: Path, **options: object) -> run.Partial:
    """Return a recipe of a second."""
    return run.Partial(learn, trainer=run.Config(Place, str(root)), optim=run.Config(Rate), **options)


def executor(**options: str) -> run.SlurmExecutor:
    """Return the lab's executor."""
    return slurm(account="root", time="00:30:00", **options)  # type: ignore[arg-type]


def launch(root: Path, axes: dict[str, list[object]], **parts: str) -> "subprocess.CompletedProcess[str]":
    """Sweep in a process of its own, as a user does: what NeMo Run runs reads the terminal."""
    given = {"recipe": "", "executor": "", "sweep": ""} | parts
    code = SCRIPT.format(root=str(root), axes=axes, **given)
    return subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )


def last_line(done: "subprocess.CompletedProcess[str]") -> str:
    return done.stderr.strip().splitlines()[-1]


def elements(lab: SlurmLab, job: str) -> dict[str, str]:
    told = lab.ask("sacct", "-j", job, "-X", "-n", "-P", "-o", "JobID,State")
    return {name: state.split()[0] for name, _, state in (line.partition("|") for line in told.splitlines())}


def job_of(out: str) -> str:
    found = re.search(r"are job array (\d+) of experiment", out)
    assert found, out
    return found[1]


@pytest.mark.slow
def test_an_array_is_followed_and_gone_on_with(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    axes: dict[str, list[object]] = {"fail": [False, True], "optim.lr": [0.1, 0.2]}
    done = launch(tmp_path, axes)
    assert last_line(done).endswith(
        "LaunchError: 2 of 4 runs failed: fail-True_lr-0.1, fail-True_lr-0.2; the same command runs them again."
    ), done.stdout + done.stderr
    job = job_of(done.stdout)
    assert elements(slurm_lab, job) == {
        f"{job}_0": "COMPLETED", f"{job}_1": "COMPLETED", f"{job}_2": "FAILED", f"{job}_3": "FAILED",
    }  # fmt: skip
    for number, rate in ((1, 0.1), (2, 0.2)):
        assert f"[{number}/4] fail-False_lr-{rate}: finished, val_loss {rate}000" in done.stdout
        assert f"[{number + 2}/4] fail-True_lr-{rate}: {SAID}" in done.stdout
    again = launch(tmp_path, axes)
    assert "2 runs are job array" in again.stdout and again.stdout.count("finished before") == 2, again.stderr
    assert len(elements(slurm_lab, job_of(again.stdout))) == 2, "what is finished is not submitted again"


@pytest.mark.slow
def test_an_array_can_be_left_and_holds_to_its_limit(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    axes: dict[str, list[object]] = {"optim.lr": [0.1, 0.2, 0.3]}
    done = launch(tmp_path, axes, recipe="seconds=600.0", sweep="parallel=1, wait=False")
    assert done.returncode == 0, done.stderr
    job = job_of(done.stdout)
    wait_until(lambda: len(list(tmp_path.glob("*/began"))) == 1, "the first run to begin")
    time.sleep(3)
    queue = slurm_lab.ask("squeue", "-r", "-h", "-j", job, "-o", "%T").split()
    assert sorted(queue) == ["PENDING", "PENDING", "RUNNING"]
    slurm_lab.ask("scancel", job)
    wait_until(lambda: not slurm_lab.ask("squeue", "-h", "-j", job).split(), "the array to be cancelled")
    assert len(list(tmp_path.glob("*/began"))) == 1
    assert len(list(tmp_path.glob("*/checkpoints"))) == 1, "the run that was going on has saved its state"


@pytest.mark.slow
def test_what_slurm_refuses_is_one_sentence_and_leaves_nothing(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    done = launch(tmp_path / "runs", {"optim.lr": [0.1, 0.2]}, executor='partition="nosuch"')
    assert done.returncode == 1 and re.search(
        r"LaunchError: could not start 'sweep' on .*invalid partition", last_line(done)
    )
    assert not (tmp_path / "runs").exists()
