"""A Slurm cluster that runs for as long as an object lives, and how to ask it."""

import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

SCRIPT = Path(__file__).with_name("slurm_up.sh")
UP_SECONDS, DOWN_SECONDS = 400, 60
PORTS = 5
NO_PACKAGES = 3
"""Exit code of the script where apt-get installs nothing."""


def absent() -> str:
    """Return what is not here that the lab needs, '' when all is."""
    if os.geteuid() != 0:
        return "the tests do not run as root"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "this container may not mount anything, and so cannot name its nodes"
    if shutil.which("slurmctld") and shutil.which("slurmdbd") and shutil.which("munged"):
        return ""
    return "" if shutil.which("apt-get") else "neither Slurm nor apt-get, which would install it, is here"


class NoPackagesError(RuntimeError):
    """Slurm is not here and cannot be installed."""


class SlurmLab:
    """Two nodes, n1 and n2, of four processors each; ``config`` is their slurm.conf."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "etc" / "slurm.conf"
        self.errors = directory / "up.log"
        with self.errors.open("w") as errors:
            self._script = subprocess.Popen(
                ["bash", str(SCRIPT), str(directory), str(free_ports(PORTS))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip
        if not self._is_ready():
            self.close()
            if self._script.returncode == NO_PACKAGES:
                raise NoPackagesError(f"apt-get could not install it: {self.errors.read_text()[-500:]}")
            raise RuntimeError(f"Slurm did not start: {self.errors.read_text()[-2000:] or 'it took too long'}")

    def _is_ready(self) -> bool:
        assert self._script.stdout is not None
        readable, _, _ = select.select([self._script.stdout], [], [], UP_SECONDS)
        return bool(readable) and self._script.stdout.readline().startswith(b"ready ")

    def close(self) -> None:
        """Stop every daemon."""
        assert self._script.stdin is not None and self._script.stdout is not None
        self._script.stdin.close()
        try:
            self._script.wait(DOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._script.kill()
        self._script.stdout.close()

    def ask(self, *command: str, limit: float = 60.0) -> str:
        """Return what one of Slurm's commands prints; an error it reports fails the test."""
        environment = {**os.environ, "SLURM_CONF": str(self.config)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return Slurm's word for the state of a job, '' before sacct has heard of it."""
        return self.ask("sacct", "-j", job, "-X", "-n", "-P", "-o", "State").partition(" ")[0]

    def wait_for(self, job: str, *states: str, limit: float = 300.0) -> str:
        """Wait until a job is in one of ``states`` and return it."""
        wait_until(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", limit)
        return self.state(job)

    def processes_on(self, node: str) -> list[int]:
        """Return the processes of jobs on a node, without Slurm's own."""
        wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.config}".encode()}
        return [process for process in _processes() if wanted <= set(_read(process, "environ").split(b"\0"))]

    def lose(self, node: str) -> None:
        """Let a node die: its daemon, what holds its steps, and the processes of jobs, all at once."""
        log = str(self.directory / "log" / f"slurmd.{node}.log")
        daemons = [
            process for process in _processes() if b"slurm" in _read(process, "comm") and _has_open(process, log)
        ]
        for process in [*daemons, *self.processes_on(node)]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def bring_back(self, node: str) -> None:
        """Start a lost node again."""
        self.ask("unshare", "--mount", "bash", str(self.directory / "etc" / "node.sh"), node)
        wait_until(lambda: self.ask("sinfo", "-h", "-n", node, "-o", "%t") in ("idle", "mix", "alloc"), node, 60)


def _processes() -> list[int]:
    return [int(place.name) for place in Path("/proc").iterdir() if place.name.isdigit()]


def _read(process: int, what: str) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process}/{what}").read_bytes()
    return b""


def _has_open(process: int, file: str) -> bool:
    with suppress(OSError):
        return any(os.readlink(link) == file for link in Path(f"/proc/{process}/fd").iterdir())
    return False


def wait_until(condition: Callable[[], bool], what: str, limit: float = 300.0) -> None:
    """Wait until ``condition`` holds; fails after ``limit`` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"waited {limit:.0f} s in vain for {what}"
        time.sleep(0.5)


def free_ports(count: int) -> int:
    """Return the first of ``count`` free ports in a row, below those that the system hands out itself."""
    for first in range(20000 + os.getpid() % 1000 * 10, 32000, count):
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports")
