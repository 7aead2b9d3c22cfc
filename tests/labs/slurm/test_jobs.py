"""What is told of jobs that are no training, and so end soon: states, every attempt's log, cancelling, a lost node."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from graftwork import executors
from graftwork.errors import ConfigError, LaunchError
from graftwork.executors import jobs
from tests.labs.slurm.lab import SlurmLab, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore:unclosed|subprocess:ResourceWarning")]


def submit(script: str, name: str, **options: Any) -> str:
    """Submit a shell script as a task of an experiment, and return the experiment's id."""
    executor = executors.slurm(**{"account": "root", "time": "00:10:00", **options})
    quiet: dict[str, Any] = {"clean_mode": True, "enable_goodbye_message": False, "skip_status_at_exit": True}
    with run.Experiment(name, executor=executor, log_level="WARNING", **quiet) as experiment:
        experiment.add(run.Script(inline=script), executor=executor, name=name)
        experiment.run(detach=True)
    identity: str = experiment._id
    return identity


def state(experiment: str) -> jobs.State:
    (only,) = jobs.states(jobs.find(experiment))
    return only


def written(experiment: str) -> list[str]:
    return list(jobs.lines(jobs.find(experiment)))


def ends(experiment: str) -> jobs.State:
    wait_until(lambda: state(experiment).is_over, f"{experiment} to end", 120)
    return state(experiment)


def test_a_failed_job_is_told_in_its_own_last_words_and_by_its_exit_code(slurm_lab: SlurmLab) -> None:
    failing = submit("echo begun; echo 'the disk is full' >&2; exit 3", "failing")
    with pytest.raises(LaunchError) as told:
        jobs.attach(failing)
    assert str(told.value).splitlines()[0].startswith("task 'failing' ended as FAILED; its log is in ")
    assert [line.strip() for line in str(told.value).splitlines()[1:3]] == ["begun", "the disk is full"]
    ended = ends(failing)
    assert (ended.state, ended.succeeded) == ("FAILED", False) and ended.words.startswith("exit code 3, after ")


def test_a_waiting_job_says_what_it_waits_for_and_cancelling_ends_it_and_no_other(
    slurm_lab: SlurmLab, capsys: pytest.CaptureFixture[str]
) -> None:
    first = submit("sleep 300", "first", nodes=2, sbatch=["--exclusive"])
    second = submit("sleep 300", "second", nodes=2, sbatch=["--exclusive"])
    wait_until(lambda: state(first).state == "RUNNING", "the first job to run", 60)
    waiting = state(second)
    assert waiting.state == "PENDING" and waiting.words in ("Resources", "Priority", "None")
    jobs.cancel(second)
    assert "second  CANCELLED" in capsys.readouterr().out
    assert state(first).state == "RUNNING"
    jobs.cancel("first")  # by its name
    assert state(first).state == "CANCELLED"
    jobs.cancel(first)
    assert "first had ended before" in capsys.readouterr().out


def test_the_log_of_a_requeued_job_is_that_of_every_attempt(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    script = f"echo attempt ${{SLURM_RESTART_COUNT:-0}}; while [ ! -e {tmp_path}/go ]; do sleep 0.2; done; echo done"
    again = submit(script, "again")
    wait_until(lambda: written(again) == ["attempt 0"], "the first attempt", 60)
    slurm_lab.ask("scontrol", "requeue", state(again).job)
    wait_until(lambda: "attempt 1" in written(again), "the second attempt", 120)
    (tmp_path / "go").touch()
    assert ends(again).succeeded
    log = written(again)
    assert log[0] == "attempt 0" and log[-2:] == ["attempt 1", "done"]


def test_following_shows_lines_as_they_are_written_and_returns_at_the_end(slurm_lab: SlurmLab) -> None:
    ticking = submit("for i in 1 2 3 4 5 6; do echo tick $i; sleep 1; done", "ticking")
    seen = [(line, time.monotonic()) for line in jobs.lines(jobs.find(ticking), follow=True)]
    assert [line for line, _ in seen] == [f"tick {i}" for i in range(1, 7)]
    assert seen[-1][1] - seen[0][1] > 2  # not all at once at the end


def test_a_killed_step_ends_the_job_soon_and_is_told(slurm_lab: SlurmLab) -> None:
    killed = submit("echo up; sleep 300", "killed", nodes=2)
    wait_until(lambda: written(killed) == ["up", "up"], "both nodes to run", 60)
    processes = slurm_lab.processes_on("n2")
    assert processes
    for process in processes:
        os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    ended = ends(killed)
    assert ended.state == "FAILED" and time.monotonic() - began < 60
    with pytest.raises(LaunchError, match="task 'killed' ended as FAILED"):
        jobs.attach(killed)


@pytest.mark.slow
def test_a_lost_node_puts_the_job_back_into_the_queue_and_it_runs_again(slurm_lab: SlurmLab) -> None:
    lost = submit(
        "echo attempt ${SLURM_RESTART_COUNT:-0}; [ ${SLURM_RESTART_COUNT:-0} = 1 ] || sleep 300", "lost", nodes=2
    )
    wait_until(lambda: written(lost) == ["attempt 0"] * 2, "both nodes to run", 60)
    slurm_lab.lose("n2")
    wait_until(lambda: state(lost).state == "PENDING", "the job to be back in the queue", 120)
    slurm_lab.bring_back("n2")
    assert ends(lost).succeeded
    assert written(lost)[-2:] == ["attempt 1"] * 2


def test_an_unknown_experiment_or_task_is_one_sentence_that_names_the_known_ones(slurm_lab: SlurmLab) -> None:
    known = submit("true", "known")
    with pytest.raises(ConfigError, match=r"^no experiment is called 'knwon_1'; .*known_\d+"):
        jobs.status("knwon_1")
    with pytest.raises(ConfigError, match=f"{known} has no task 'nix'; valid: known"):
        jobs.logs(known, task="nix")
    with pytest.raises(ConfigError, match="cancel needs the id of an experiment; .*known"):
        jobs.cancel()
    assert ends(known).succeeded
