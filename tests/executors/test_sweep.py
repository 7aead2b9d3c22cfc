"""A sweep is one experiment: so many runs at a time, finished ones once, a failed one alone, a stop for all."""

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
from tests.helpers.sweeps import Place, Rate, learn

SAID = "train.jsonl, line 3: field 'output' is missing; valid: input, output."


def recipe(root: Path, **options: Any) -> run.Partial:
    return run.Partial(learn, trainer=run.Config(Place, str(root)), optim=run.Config(Rate), **options)


def times(root: Path, what: str) -> list[float]:
    return sorted(float(line) for file in root.glob(f"*/{what}") for line in file.read_text().split())


def together(root: Path) -> int:
    """The most runs that went on at one time."""
    events = sorted([(t, 1) for t in times(root, "began")] + [(t, -1) for t in times(root, "ended")])
    return max(sum(change for _, change in events[: i + 1]) for i in range(len(events)))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [re.sub(r", \d+ s$", "", line) for line in capsys.readouterr().out.splitlines()]


def test_so_many_at_a_time_and_what_is_left_the_next_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = recipe(tmp_path)
    recipes = grid(base, {"fail": [False, True], "seconds": [4.0]}) + grid(base, {"seconds": [3.0, 5.0]})
    with pytest.raises(LaunchError, match=r"^1 of 4 runs failed: fail-True_seconds-4.0; the same command runs them a"):
        sweep(recipes, local(), name="some runs", parallel=2)
    told = lines(capsys)
    assert told.count("[1/4] fail-False_seconds-4.0: finished, val_loss 0.1000") == 1
    assert told.count(f"[2/4] fail-True_seconds-4.0: {SAID}") == 1
    assert sum("finished" in line for line in told) == 3 and sum("started" in line for line in told) == 4
    began, ended = times(tmp_path, "began"), times(tmp_path, "ended")
    assert len(began) == 4 and together(tmp_path) <= 3  # the one that failed has no end
    assert began[-1] < ended[-2], "a run waits for any place, not for all of them"
    (experiment,) = Path(os.environ["NEMORUN_HOME"], "experiments", "some-runs").iterdir()
    assert {f"{i}-{name}" for i, name in ((1, "fail-False_seconds-4-0"), (4, "seconds-5-0"))} <= {
        path.name for path in experiment.iterdir()
    }
    added = [*recipes, *grid(base, {"seconds": [1.0]})]
    with pytest.raises(LaunchError, match=r"^1 of 2 runs failed"):
        sweep(added)
    told = lines(capsys)
    assert sorted(told[:3]) == [
        "[1/5] fail-False_seconds-4.0: finished before, val_loss 0.1000",
        "[3/5] seconds-3.0: finished before, val_loss 0.1000",
        "[4/5] seconds-5.0: finished before, val_loss 0.1000",
    ]
    assert told[3:] == [
        "[2/5] fail-True_seconds-4.0: started", f"[2/5] fail-True_seconds-4.0: {SAID}",
        "[5/5] seconds-1.0: started", "[5/5] seconds-1.0: finished, val_loss 0.1000",
    ], "one after another"  # fmt: skip
    assert sweep([*recipes[:1], *recipes[2:]]) == "", "nothing is left"


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


def test_a_stop_reaches_every_run_and_starts_no_other(tmp_path: Path) -> None:
    started = start(tmp_path, seconds=600)
    deadline = time.monotonic() + 120
    while len(times(tmp_path / "runs", "began")) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    out, told = started.communicate(timeout=120)
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
