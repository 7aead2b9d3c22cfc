"""Real Slurm, two nodes: the recipe of one process gives its losses there, and a job that is disturbed its weights."""

import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from nemo_run.config import get_nemorun_home

from graftwork import executors, recipes
from graftwork.errors import LaunchError
from graftwork.executors import jobs
from tests.helpers.tiny_recipe import summary
from tests.helpers.transcript import Transcript
from tests.labs.slurm.lab import SlurmLab, wait_until
from tests.labs.slurm.lab_recipe import STEPS, over_nodes, over_ranks, paused, recipe
from tests.labs.slurm.login_node import PYTHON, login_node
from tests.labs.slurm.pause import go

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore:unclosed|subprocess:ResourceWarning")]

NEMORUN = str(Path(sys.executable).with_name("nemorun"))
WEIGHTS = "adapter/adapter_model.safetensors"
LIMIT = 600.0
"""Seconds that a job may take: a loaded machine needs many times what an idle one does."""


def nemorun(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    typed = [NEMORUN, "graft", *arguments]
    return subprocess.run(typed, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT, cwd=cwd)


def slurm(**options: Any) -> Any:
    return executors.slurm(**{"account": "root", "time": "00:15:00", **options})


def job_of(experiment: str) -> str:
    return jobs.states(jobs.find(experiment))[0].job


def reached(directory: Path, experiment: str) -> None:
    """Wait until the training stands still in mid-run; a job that has ended before fails the test."""

    def there() -> bool:
        (state,) = jobs.states(jobs.find(experiment))
        assert not state.is_over, state
        return (directory / "reached").exists()

    wait_until(there, f"{experiment} to be in mid-run", LIMIT)


def attached(experiment: str) -> str:
    """Follow a job to its end and return the whole of its log."""
    jobs.attach(experiment)
    return "\n".join(jobs.lines(jobs.find(experiment)))


@pytest.fixture(scope="module")
def here(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the undisturbed run, in one process of this machine."""
    directory = tmp_path_factory.mktemp("here")
    go(directory)
    executors.launch(recipe(place, "here", pause=paused(directory)), name="here", tail=False)
    return place / "here"


def same_losses(run: Path, here: Path) -> None:
    ours, theirs = summary(run), summary(here)
    assert ours["steps"] == theirs["steps"] == STEPS
    for loss in ("train_loss", "val_loss"):
        assert ours[loss] == pytest.approx(theirs[loss], rel=1e-5)


def same_weights(run: Path, here: Path) -> None:
    assert (run / WEIGHTS).read_bytes() == (here / WEIGHTS).read_bytes()


def test_two_nodes_give_one_rank_s_losses_and_are_followed_from_other_shells(
    slurm_lab: SlurmLab, place: Path, here: Path
) -> None:
    recipes.save(recipe(place, "two", *over_nodes()), place / "two.yaml")
    shell = Transcript({str(place): "/shared", get_nemorun_home(): "~/.nemo_run"})

    def typed(*arguments: str) -> str:
        done = nemorun(*arguments, cwd=place)
        assert done.returncode == 0, done.stderr
        shell.add(shlex.join(["nemorun", "graft", *arguments]), done.stdout)
        return done.stdout

    submitted = typed("finetune", "--file", "two.yaml", "run.executor=slurm", "run.executor.account=root",
                      "run.executor.time=00:15:00", "--detach", "--yes")  # fmt: skip
    found = re.search(r"finetune_\d+", submitted)
    assert found, submitted
    experiment = found[0]
    wait_until(lambda: jobs.states(jobs.find(experiment))[0].state == "RUNNING", "the job to run")
    assert re.search(r"finetune  RUNNING ", typed("status", experiment))
    assert f"step {STEPS}/{STEPS}" in typed("attach", experiment)
    same_losses(place / "two", here)

    slurm_lab.wait_for(job_of(experiment), "COMPLETED")
    sizes = slurm_lab.ask("sacct", "-j", job_of(experiment), "-X", "-n", "-P", "-o", "NNodes,NodeList")
    assert sizes == "2|n[1-2]"
    shell.check("cluster.md", "slurm")


@pytest.mark.slow
def test_a_requeued_run_goes_on_and_ends_with_the_weights_of_an_undisturbed_one(
    slurm_lab: SlurmLab, place: Path, here: Path, tmp_path: Path
) -> None:
    experiment = executors.launch(recipe(place, "requeued", pause=paused(tmp_path)), slurm(), name="again", wait=False)
    reached(tmp_path, experiment)
    slurm_lab.ask("scontrol", "requeue", job_of(experiment))
    go(tmp_path)
    log = attached(experiment)
    same_weights(place / "requeued", here)
    assert "stopped after step 3" in log  # of the first attempt
    assert (place / "requeued" / "summary.json").exists()


@pytest.mark.slow
def test_a_launch_from_python_waits_and_shows_what_rank_0_prints(
    slurm_lab: SlurmLab, place: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    executors.launch(recipe(place, "python", *over_ranks()), slurm(nodes=2, ntasks_per_node=2), name="python")
    shown = capfd.readouterr().out
    assert str(STEPS) in shown and "[default" not in shown
    same_losses(place / "python", here)


@pytest.mark.slow
def test_the_code_of_the_commit_reaches_a_job_over_ssh(
    slurm_lab: SlurmLab, place: Path, here: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / "far"
    far.mkdir()
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PATH", f"{far / 'bin'}:{os.environ['PATH']}")
    with login_node(far, slurm_lab) as ssh:
        setup = [f"export PATH={PYTHON}:$PATH"]
        executor = slurm(code="git", job_dir=str(tmp_path / "jobs"), setup=setup, **ssh)
        log = attached(executors.launch(recipe(place, "far"), executor, name="far", wait=False))
    assert "the commit runs" in log
    same_weights(place / "far", here)


@pytest.mark.slow
def test_a_warning_before_the_time_limit_saves_the_state_and_the_job_comes_back(
    slurm_lab: SlurmLab, place: Path, here: Path, tmp_path: Path
) -> None:
    executor = slurm(warning=120, time="00:03:00", requeues=2)
    experiment = executors.launch(recipe(place, "warned", pause=paused(tmp_path)), executor, name="warned", wait=False)
    reached(tmp_path, experiment)
    job = job_of(experiment)
    batch = jobs.find(experiment).jobs[0].executor.job_dir
    wait_until(lambda: _seconds(slurm_lab.ask("squeue", "-h", "-j", job, "-o", "%M")) > 70, "the warning", LIMIT)
    go(tmp_path)
    log = attached(experiment)
    assert "stopped after step 3" in log
    assert len(list(Path(batch).glob(f"log-*_{job}_*.out"))) >= 2  # one for each attempt
    same_weights(place / "warned", here)


def _seconds(elapsed: str) -> int:
    total = 0
    for part in elapsed.split(":"):
        total = total * 60 + int(part)
    return total


@pytest.mark.slow
def test_a_cancelled_run_saves_its_state_and_the_same_recipe_goes_on(
    slurm_lab: SlurmLab, place: Path, here: Path, tmp_path: Path
) -> None:
    task = recipe(place, "cancelled", pause=paused(tmp_path))
    experiment = executors.launch(task, slurm(), name="cancelled", wait=False)
    reached(tmp_path, experiment)
    job = job_of(experiment)
    with ThreadPoolExecutor() as beside:
        cancelling = beside.submit(nemorun, "cancel", experiment)
        wait_until(lambda: slurm_lab.ask("squeue", "-h", "-j", job, "-o", "%T") != "RUNNING", "scancel", LIMIT)
        go(tmp_path)
        done = cancelling.result()
    assert done.returncode == 0 and "CANCELLED" in done.stdout, done.stdout + done.stderr
    assert not (place / "cancelled" / "summary.json").exists()
    executors.launch(task, slurm(), name="cancelled", tail=False)
    same_weights(place / "cancelled", here)


@pytest.mark.slow
def test_one_crashed_rank_ends_the_job_with_its_own_words(slurm_lab: SlurmLab, place: Path, tmp_path: Path) -> None:
    task = recipe(place, "crashed", *over_ranks(), pause=paused(tmp_path, crash=3))
    experiment = executors.launch(task, slurm(nodes=2, ntasks_per_node=2), name="crashed", wait=False)
    with pytest.raises(LaunchError) as told:
        jobs.attach(experiment)
    cause = "the cause, on rank 3: ZeroDivisionError: a bug in the middle of a step"
    assert str(told.value).splitlines()[-1] == cause
    assert nemorun("attach", experiment).returncode == 1


@pytest.mark.slow
def test_ranks_that_are_killed_end_the_job_soon(slurm_lab: SlurmLab, place: Path, tmp_path: Path) -> None:
    task = recipe(place, "killed", *over_ranks(), pause=paused(tmp_path))
    experiment = executors.launch(task, slurm(nodes=2, ntasks_per_node=2), name="killed", wait=False)
    reached(tmp_path, experiment)
    for process in slurm_lab.processes_on("n2"):
        os.kill(process, signal.SIGKILL)
    go(tmp_path)
    with pytest.raises(LaunchError, match="task 'killed' ended as FAILED"):
        jobs.attach(experiment)


@pytest.mark.slow
def test_a_run_goes_on_when_the_node_that_it_lost_comes_back(
    slurm_lab: SlurmLab, place: Path, here: Path, tmp_path: Path
) -> None:
    task = recipe(place, "lost", *over_ranks(), pause=paused(tmp_path))
    experiment = executors.launch(task, slurm(nodes=2, ntasks_per_node=2), name="lost", wait=False)
    reached(tmp_path, experiment)
    slurm_lab.lose("n2")
    wait_until(lambda: jobs.states(jobs.find(experiment))[0].state == "PENDING", "the job to be queued again", LIMIT)
    slurm_lab.bring_back("n2")
    go(tmp_path)
    jobs.attach(experiment)
    same_losses(place / "lost", here)
