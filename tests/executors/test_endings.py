"""Endings that people can trust: a stop reaches every rank, is told in one line, and leaves no process behind.

Real processes: a script that launches, torchrun, ranks. Each test waits for what a process has done, never for time.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graftwork.executors.process.task import alive
from graftwork.training.run_directory import states
from tests.helpers import tiny_run
from tests.helpers.snippets import ROOT

PATIENCE = 600.0

# No `if __name__ == "__main__":`: what a task runs does not depend on the script that launched it.
SCRIPT = """
import sys
import nemo_run as run
from graftwork.executors import launch, local
from tests.helpers import tasks

print("this script begins")
task = getattr(tasks, sys.argv[1])
launch(run.Partial(task, directory=sys.argv[2]), local(ntasks=int(sys.argv[3])))
"""


class Tree:
    """A launching script, its torchrun and its ranks."""

    def __init__(self, task: str, directory: Path, ranks: int) -> None:
        script = directory / "script.py"
        script.write_text(SCRIPT)
        self.directory, self.ranks = directory, ranks
        arguments = [sys.executable, str(script), task, str(directory), str(ranks)]
        self.launcher = subprocess.Popen(
            arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.processes = {"launcher": self.launcher.pid}

    def wait_for_ranks(self) -> None:
        """Wait until every rank rests; then all processes are known."""
        files = [self.directory / f"rank{rank}" for rank in range(self.ranks)]
        wait_until(lambda: all(f.exists() for f in files) or self.launcher.poll() is not None)
        assert self.launcher.poll() is None, self.launcher.communicate()
        for rank, file in enumerate(files):
            own, parent = map(int, file.read_text().split())
            self.processes[f"rank {rank}"] = own
            if parent != self.launcher.pid:
                self.processes["torchrun"] = parent

    def end(self) -> tuple[int, str, list[str]]:
        """Wait for the launcher; return its exit code, its output and the lines of its errors."""
        out, err = self.launcher.communicate(timeout=PATIENCE)
        return self.launcher.returncode, out, err.splitlines()

    def survivors(self) -> list[str]:
        """Return who still runs."""
        return [name for name, process in self.processes.items() if alive(process)]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Callable[..., Tree]]:
    """Start trees of processes; whatever is left of them at the end is killed."""
    made: list[Tree] = []

    def make(task: str, ranks: int) -> Tree:
        made.append(Tree(task, tmp_path, ranks))
        made[-1].wait_for_ranks()
        return made[-1]

    yield make
    for one in made:
        for process in one.processes.values():
            if alive(process):
                os.kill(process, signal.SIGKILL)
        one.launcher.communicate()


STOPS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
SLOW = (signal.SIGTERM, signal.SIGUSR1, "torchrun", "launcher")
"""What is asked for in `make test-all` only: each tree of processes imports torch three times."""


def cases(*all_of_them: object) -> list[object]:
    return [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in all_of_them]


@pytest.mark.processes
@pytest.mark.parametrize("number", cases(*STOPS))
def test_a_stop_reaches_every_rank_and_says_how_to_go_on(number: signal.Signals, tree: Callable[..., Tree]) -> None:
    running = tree("stop_saved", 2)
    running.launcher.send_signal(number)
    code, out, err = running.end()
    assert (code, running.survivors()) == (STOPS[number], [])
    assert err[0].startswith("stopping after this step to save the state") and len(err) == 2, err
    assert err[1] == f"stopped after step 3, its state is saved (exit code {code})"
    assert out == "this script begins\n"


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_anything_was_saved_says_so(number: signal.Signals, tree: Callable[..., Tree]) -> None:
    running, code = tree("rest", 1), {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    running.launcher.send_signal(number)
    ended, out, err = running.end()
    assert (ended, running.survivors(), out) == (code, [], "this script begins\n")
    assert err[1:] == [
        f"stopped before there was anything to save; the same command begins where this one did (exit code {code})"
    ]


@pytest.mark.slow
@pytest.mark.processes
def test_a_second_ctrl_c_stops_at_once(tree: Callable[..., Tree]) -> None:
    running = tree("stubborn", 2)
    running.launcher.send_signal(signal.SIGINT)
    wait_until(lambda: (running.directory / "asked0").exists() and (running.directory / "asked1").exists())
    running.launcher.send_signal(signal.SIGINT)
    code, _, err = running.end()
    wait_until(lambda: running.survivors() == [])
    assert code == 130 and err[1].startswith("stopped at once"), err


@pytest.mark.processes
@pytest.mark.parametrize("victim", cases("launcher", "torchrun", "rank 1"))
def test_no_process_survives_its_parent(victim: str, tree: Callable[..., Tree]) -> None:
    running = tree("rest", 2)
    os.kill(running.processes[victim], signal.SIGKILL)
    code, _, err = running.end()
    wait_until(lambda: running.survivors() == [])
    if victim == "launcher":
        assert code == -signal.SIGKILL
    else:
        assert code == 1 and "graftwork.errors.LaunchError: task 'graftwork' ended as FAILED" in "\n".join(err)
    if victim == "rank 1":
        assert "rank 1 was ended by SIGKILL" in err[-1]


def training(root: Path, ranks: int) -> list[str]:
    """Return a command that trains a tiny random base."""
    shape = {name: getattr(tiny_run.SHAPE, name) for name in ("num_layers", "hidden_size", "ffn_hidden_size")}
    shape |= {"num_attention_heads": 4, "num_query_groups": 2, "vocab_size": tiny_run.SHAPE.vocab_size}
    return [
        str(Path(sys.executable).with_name("nemorun")), "graft", "finetune", "--yes",
        "--factory", f"smollm2_135m(dir={root},name=run)", "model.checkpoint=None", f"data.tokenizer={root}/tokenizer",
        *(f"model.shape.{name}={value}" for name, value in shape.items()),
        f"data.train={root}/train.jsonl", f"data.cache_dir={root}/cache", "data.validation_fraction=0.25",
        "data.seq_length=48", "data.micro_batch_size=4", "model.dtype=fp32", "peft=[lora(dim=4)]",
        "trainer.max_steps=40", "trainer.val_check_interval=20", "trainer.accelerator=cpu", f"trainer.devices={ranks}",
    ]  # fmt: skip


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def stopped(command: list[str], number: signal.Signals) -> tuple[int, list[str]]:
    """Start a training, stop it after the first step that it tells of, and return its exit code and its errors."""
    process = start(command)
    assert process.stdout is not None
    seen = next((line for line in iter(process.stdout.readline, "") if line.startswith("step ")), "")
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert seen, err
    return process.returncode, err.splitlines()


@pytest.mark.processes
@pytest.mark.slow
def test_ctrl_c_in_one_process_saves_the_state_and_says_how_to_go_on(tmp_path: Path) -> None:
    code, err = stopped(training(tiny_run.write_data(tmp_path), ranks=1), signal.SIGINT)
    assert code == 130 and err[-2].startswith("stopping after this step"), err
    assert err[-1] == told_after(tmp_path / "run", 130)


def told_after(run: Path, code: int) -> str:
    """Return the line that tells of a stop after the only state that was saved."""
    [state] = states(run)
    step = int(state.name.removeprefix("step-"))
    return f"stopped after step {step}, its state is saved; the same command goes on from there (exit code {code})"


@pytest.mark.slow
@pytest.mark.processes
def test_a_training_on_two_ranks_saves_its_state_and_goes_on_to_a_printed_summary(tmp_path: Path) -> None:
    command, run = training(tiny_run.write_data(tmp_path), ranks=2), tmp_path / "run"
    code, err = stopped(command, signal.SIGTERM)
    assert (code, err[-1]) == (75, told_after(run, 75)), err

    process = start(command)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and f"resuming from {states(run)[0].parent}" in out, (out, err)
    summary = json.loads(out[out.index("\n{\n") :])
    assert summary == json.loads((run / "summary.json").read_text()) and summary["steps"] == 40
