"""Endings that people can trust: a stop reaches every rank, is told in one line, and leaves no process behind.

Real processes: a script that launches, torchrun, ranks. Each test waits for what a process has done, never for time.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graftwork.executors.task import alive
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
SLOW = (signal.SIGUSR1, signal.SIGINT, "torchrun")
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
@pytest.mark.parametrize("number", cases(signal.SIGTERM, signal.SIGINT))
def test_a_stop_before_anything_was_saved_says_so(number: signal.Signals, tree: Callable[..., Tree]) -> None:
    running, code = tree("rest", 1), {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    running.launcher.send_signal(number)
    ended, _, err = running.end()
    assert (ended, running.survivors()) == (code, [])
    assert err[1:] == [
        f"stopped before there was anything to save; the same command begins where this one did (exit code {code})"
    ]


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
