"""A sweep is one experiment: so many runs at a time, finished ones once, a failed one alone, a stop for all."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from graftwork.errors import ConfigError, LaunchError, ParallelismError
from graftwork.executors import local
from graftwork.executors.sweep import GOES_ON, Member, sweep
from graftwork.recipes import grid, show
from tests.helpers.sweeps import PATIENCE, Place, Rate, learn

SAID = "train.jsonl, line 3: field 'output' is missing; valid: input, output."


def recipe(root: Path, **options: Any) -> run.Partial:
    return run.Partial(learn, trainer=run.Config(Place, str(root)), optim=run.Config(Rate), **options)


def times(root: Path, what: str) -> list[float]:
    return sorted(float(line) for file in root.glob(f"*/{what}") for line in file.read_text().split())


def together(told: list[str]) -> int:
    """The most runs that went on at one time, by what was told."""
    changes = [1 if line.endswith(": started") else 0 if "finished before" in line else -1 for line in told]
    return max(itertools.accumulate(changes))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [re.sub(r", \d+ s$", "", line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_so_many_at_a_time_and_what_is_left_the_next_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # a ends when c has begun: a run takes any place that is free, and does not wait for all that began before it
    recipes = [
        recipe(tmp_path / "a", wait_for=str(tmp_path / "c" / "began")),
        recipe(tmp_path / "b", fail=True),
        recipe(tmp_path / "c"),
    ]
    with pytest.raises(LaunchError, match=r"^1 of 3 runs failed: b; the same command runs them again\.$"):
        sweep(recipes, local(), name="some runs", parallel=2)
    told = lines(capsys)
    assert sorted(told) == [
        "[1/3] a: finished, val_loss 0.1000", "[1/3] a: started", "[2/3] b: started", f"[2/3] b: {SAID}",
        "[3/3] c: finished, val_loss 0.1000", "[3/3] c: started",
    ]  # fmt: skip
    assert together(told) == 2
    (experiment,) = Path(os.environ["NEMORUN_HOME"], "experiments", "some-runs").iterdir()
    assert {"1-a", "2-b", "3-c"} <= {path.name for path in experiment.iterdir()}, "one experiment has them all"
    with pytest.raises(LaunchError, match=r"^1 of 2 runs failed: b;"):
        sweep([*recipes, recipe(tmp_path / "d")])
    told = lines(capsys)
    assert told == [
        "[1/4] a: finished before, val_loss 0.1000", "[3/4] c: finished before, val_loss 0.1000",
        "[2/4] b: started", f"[2/4] b: {SAID}",
        "[4/4] d: started", "[4/4] d: finished, val_loss 0.1000",
    ], "one after another"  # fmt: skip
    assert len(times(tmp_path, "began")) == 5
    assert sweep([recipes[0], recipes[2]]) == "", "nothing is left"


def test_a_run_is_finished_when_this_very_recipe_has_ended(tmp_path: Path) -> None:
    def finished(**options: Any) -> bool:
        return Member(recipe(tmp_path, **options), local(), (1, 1)).is_finished

    assert not finished()
    learn(Place(str(tmp_path)), Rate(), recipe_text=show(recipe(tmp_path)))
    assert finished() and not finished(seconds=1.0) and not finished(resume=False)
    (tmp_path / "summary.json").write_text("{")
    assert not finished()


SCRIPT = """
from pathlib import Path
from graftwork.executors.sweep import GOES_ON, Member, sweep
from graftwork.recipes import grid, show
from tests.executors.test_sweep import recipe
sweep(grid(recipe(Path({root!r}), seconds={seconds}), {{"optim.lr": [0.1, 0.2, 0.3]}}), parallel=2)
"""


def start(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    code = SCRIPT.format(root=str(tmp_path / "runs"), seconds=seconds)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, cwd=Path(__file__).parents[2]
    )


@pytest.mark.slow
def test_a_stop_reaches_every_run_and_starts_no_other(tmp_path: Path) -> None:
    started = start(tmp_path, seconds=600)
    deadline = time.monotonic() + PATIENCE
    while len(times(tmp_path / "runs", "began")) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    out, told = started.communicate(timeout=PATIENCE)
    assert started.returncode == 130 and GOES_ON in told, told
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert runs == {"lr-0.1", "lr-0.2"}, "the third was never started"
    assert all((tmp_path / "runs" / name / "checkpoints").is_dir() for name in runs), "both have saved a state"
    assert out.count("stopped after step 3, its state is saved") == 2
    assert not times(tmp_path / "runs", "ended")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a value": ({"optim.lr": [0.1, -1.0]}, "run 'lr--1.0': optim.lr=-1.0 must be above 0."),
    "parallel": ({"optim.lr": [0.1]}, "parallel=0: at least 1 run at a time is valid."),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_told_before_anything_starts(tmp_path: Path, kind: str) -> None:
    axes, said = REFUSED[kind]
    with pytest.raises(ConfigError, match=re.escape(said)):
        sweep(grid(recipe(tmp_path / "runs"), axes), parallel=0 if kind == "parallel" else None)
    assert not (tmp_path / "runs").exists()


def test_runs_must_have_directories_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs 1 and 2 of the sweep have one directory"):
        sweep([recipe(tmp_path), recipe(tmp_path, seconds=1.0)])
    with pytest.raises(ConfigError, match=r"at least one recipe"):
        sweep([])
    with pytest.raises(ParallelismError, match=r"ntasks_per_node=2"):
        sweep([recipe(tmp_path)], local(ntasks=2))
