"""launch(): what the task did is what the caller learns."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import nemo_run as run
import pytest

from graftwork.endings import Interrupted
from graftwork.errors import ConfigError, DataError, LaunchError
from graftwork.executors import launch, local
from graftwork.executors.following.live import LiveLog
from graftwork.executors.following.outcome import check, failure, log_lines
from graftwork.executors.following.relay import Relay
from graftwork.executors.process.task import as_task
from graftwork.executors.submission.experiment import without_ranks
from graftwork.executors.submission.job import task_name
from tests.helpers.snippets import ROOT
from tests.helpers.tasks import write_ranks


def test_a_task_runs_in_another_process_with_quiet_threads(tmp_path: Path) -> None:
    executor = local(env={"OMP_NUM_THREADS": "3"}).to_config()
    identifier = launch(run.Partial(write_ranks, directory=str(tmp_path)), executor, name="one task")
    assert identifier.startswith("one-task_")
    assert (tmp_path / "rank0").read_text() == "3"


def test_a_rank_s_own_error_comes_back_as_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^train.jsonl, line 3: field 'output' is missing; valid: input, output.$"):
        launch(run.Partial(write_ranks, directory=str(tmp_path), fail="data"), local(ntasks=2), tail=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank0", "rank1"]


def test_a_task_does_not_inherit_this_process_s_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"RANK": "5", "WORLD_SIZE": "6", "MASTER_PORT": "29500", "LOCAL_RANK": "5", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    with without_ranks():
        assert not set(kept) & set(os.environ) and "PATH" in os.environ
    assert {name: os.environ[name] for name in kept} == kept


def test_a_bug_comes_back_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="ended as FAILED") as caught:
        launch(run.Partial(write_ranks, directory=str(tmp_path), fail="bug"), tail=False)
    assert str(caught.value).endswith("\nthe cause, on rank 0: ZeroDivisionError: a bug")


def test_an_executor_that_cannot_start_says_so(tmp_path: Path) -> None:
    broken = local(ntasks=2, env={"PATH": str(tmp_path)})
    with pytest.raises(LaunchError, match="could not start 'graftwork'.*torchrun"):
        launch(run.Partial(write_ranks, directory=str(tmp_path)), broken)


@pytest.mark.fault(
    "a failed task exits with 0",
    "every outcome but success raises",
)
def test_every_outcome_but_success_is_a_failure(tmp_path: Path) -> None:
    for outcome in ("FAILED", "CANCELLED", "UNKNOWN", "PENDING"):
        with pytest.raises(LaunchError, match=outcome):
            check({"task": {"status": outcome, "local_dir": str(tmp_path)}})
    check({"task": {"status": "SUCCEEDED", "local_dir": str(tmp_path)}})


def test_a_detached_task_may_be_on_its_way_but_not_have_failed(tmp_path: Path) -> None:
    for outcome in ("RUNNING", "PENDING", "UNKNOWN"):
        check({"task": {"status": outcome, "local_dir": str(tmp_path)}}, detached=True)
    with pytest.raises(LaunchError, match="FAILED"):
        check({"task": {"status": "FAILED", "local_dir": str(tmp_path)}}, detached=True)


def write_logs(directory: Path, **logs: str) -> None:
    for age, (name, text) in enumerate(logs.items()):
        (directory / f"{name}.log").write_text(text)
        os.utime(directory / f"{name}.log", (1000 + age, 1000 + age))


def test_log_lines_end_with_the_file_written_last(tmp_path: Path) -> None:
    write_logs(tmp_path, b="from b\n\n", a="from a\n")
    assert log_lines(tmp_path) == ["from b", "from a"]


def test_log_lines_of_ranks_leave_the_launcher_out(tmp_path: Path) -> None:
    write_logs(tmp_path, combined="[default0]:the cause\n", stderr="[default1]: too\nChildFailedError: see elsewhere\n")
    assert log_lines(tmp_path) == ["the cause", "too"]


EPILOGUE = """Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 7)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 7
"""
SAVED = "stopped after step 3, its state is saved; the same command goes on from there (exit code 75)"
ENDED = {
    "its own error": (
        f"[default1]:{SAVED}\n[default0]:graftwork.errors.DataError: no rows.\n",
        DataError,
        "^no rows.$",
    ),
    "a killed rank": (f"[default0]:RuntimeError: lost a peer\n{EPILOGUE}", LaunchError, "rank 1 was ended by SIGKILL"),
    "a stop": (f"[default0]:{SAVED}\n[default1]:{SAVED}\n", Interrupted, "^stopped after step 3, .*code 75"),
    "a bug": (f"[default0]:{SAVED}\n[default1]:Traceback (most\n[default1]:KeyError: 1\n", LaunchError, "KeyError: 1"),
    "a crash without torchrun": (
        "step 1\ngraftwork: rank 3 crashed: KeyError: 1\n[rank3]: Traceback (most\n[rank3]: KeyError: 1\n",
        LaunchError,
        "\nthe cause, on rank 3: KeyError: 1$",
    ),
    "a crash": (
        "[default1]:graftwork: rank 1 crashed: KeyError: 1\n[default0]:graftwork: rank 0 crashed: RuntimeError: peer\n",
        LaunchError,
        "\nthe cause, on rank 1: KeyError: 1$",
    ),
}


@pytest.mark.parametrize("case", ENDED)
def test_the_cause_is_found_in_the_log(case: str, tmp_path: Path) -> None:
    text, kind, message = ENDED[case]
    write_logs(tmp_path, combined=text)
    with pytest.raises(kind, match=message):
        raise failure("task", "FAILED", tmp_path)


def test_a_live_log_shows_what_rank_0_says_and_what_else_is_printed() -> None:
    stdout = io.StringIO()
    log = LiveLog(stdout, "a-long-name-of-a-task", ranks=True)  # NeMo Run shows its last ten characters
    for line in (
        "[default0]:step 1\n",
        "[default1]:step 1\n",
        "W0101 torchrun\n",
        "[default0]:graftwork.errors.DataError: x\n",
    ):
        log.write(f"\x1b[32m-of-a-task/0\x1b[0m {line}")
    log.write("-of-a-task/0 [default0]:no terminal\n")
    container = LiveLog(stdout, "finetune", ranks=False)
    container.write("7-finetune/0 step 2\n")
    log.write("printed by the script\n")
    log.silent = True
    log.write("-of-a-task/0 [default0]:step 2\n")
    assert stdout.getvalue() == "step 1\nno terminal\nstep 2\nprinted by the script\n"


def test_after_a_stop_only_ctrl_c_asks_for_more(capfd: pytest.CaptureFixture[str]) -> None:
    relay = Relay(LiveLog(io.StringIO(), "task", ranks=True))
    failed = LaunchError("the task was ended")
    assert relay.ending(failed) is failed
    relay(signal.SIGTERM)
    relay(signal.SIGUSR1)
    ended = relay.ending(failed)
    assert isinstance(ended, Interrupted) and ended.code == 143 and "before there was anything to save" in str(ended)
    relay(signal.SIGINT)
    assert str(relay.ending(failed)).startswith("stopped at once")
    assert relay.ending(None) is None
    assert len(capfd.readouterr().err.splitlines()) == 1


SCRIPT = """
import nemo_run as run
from graftwork.executors import launch

def task() -> None:
    print("the task runs")

print("this script begins")
"""


def script(directory: Path, end: str) -> subprocess.CompletedProcess[str]:
    """Run a script that launches something of its own."""
    path = directory / "script.py"
    path.write_text(SCRIPT + end)
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_a_script_that_would_launch_again_inside_its_task_is_refused(tmp_path: Path) -> None:
    done = script(tmp_path, "launch(run.Partial(task))\n")
    assert done.stdout == "this script begins\n" and done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "graftwork.errors.ConfigError: the recipe uses something that script.py defines, so the task runs this script "
        "once more; put line 9, which launches, under if __name__ == '__main__':"
    )


@pytest.mark.slow
@pytest.mark.processes
def test_what_a_guarded_script_defines_runs_in_the_task(tmp_path: Path) -> None:
    done = script(tmp_path, 'if __name__ == "__main__":\n    launch(run.Partial(task))\n')
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["the task runs", "this script begins", "this script begins"]


def test_local_runs_the_interpreter_that_submits() -> None:
    executor = local()
    assert executor.env_vars["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    assert (executor.launcher, local(ntasks=2).nproc_per_node()) == (None, 2)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"ntasks": 0}, "at least 1"), ({"launcher": "torchrnu"}, "did you mean 'torchrun'")]
)
def test_wrong_arguments_name_what_is_valid(kwargs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        local(**kwargs)


def test_a_name_without_a_usable_character_is_refused() -> None:
    assert task_name("my run/1") == "my-run-1"
    with pytest.raises(ConfigError):
        task_name("///")


def test_a_recipe_that_cannot_travel_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="cannot be sent to another process: "):
        as_task(run.Partial(write_ranks, directory=object()))
