"""What a profile promises, tried out from here: commands, partition, account, image, tunnel, directories, code."""

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_run.config import get_nemorun_home

from graftwork.errors import GraftworkError, quoted, suggest
from graftwork.executors.cluster.packaging import code
from graftwork.executors.cluster.profile import Profile
from graftwork.executors.placing.refusals import explain_text

SECONDS = 60
"""How long a command may take."""

_WRITABLE = 'mkdir -p {0} && file=$(mktemp {0}/.graftwork-XXXXXX) && rm "$file"'


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: ``what`` it is, whether it is ``good``, and the ``words`` about it."""

    what: str
    good: bool
    words: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.good else 'FAILED'}  {self.what}: {self.words}"


@dataclass(frozen=True)
class Answer:
    """What a command said: ``good`` when it ended with 0, ``words`` from both of its outputs."""

    good: bool
    words: str

    @property
    def brief(self) -> str:
        """The words on one line."""
        return quoted(" ".join(self.words.split()), 300, bare=True)


Shell = Callable[[str], Answer]
"""Runs a line of shell where the profile submits: here, or over ssh."""


def check_up(profile: Profile) -> Iterator[Finding]:
    """Yield the findings about a profile, in the order in which a submission needs them; nothing is submitted."""
    yield from _slurm(profile) if profile.executor == "slurm" else _docker(profile)
    yield _code(profile)


def _slurm(profile: Profile) -> Iterator[Finding]:
    shell = shell_of(profile)
    if profile.ssh is not None:
        place = f"{profile.ssh.user}@{profile.ssh.host}:{profile.ssh.port}"
        reached = shell("true")
        yield Finding("ssh", reached.good, f"{place} answers" if reached.good else f"{place}: {reached.brief}")
        if not reached.good:
            return
        yield _commands(shell_here, ("rsync",), "rsync here")
        yield _commands(shell, ("rsync",), "rsync there")
    tools = _commands(shell, ("sbatch", "srun", "sacct", "scancel"), "slurm")
    yield tools
    if tools.good:
        yield from _cluster(profile, shell)
    yield _directory(profile, shell)
    if profile.container_image is not None:
        yield _image(profile.container_image, shell)
    elif profile.setup or profile.ssh is not None:
        yield _python(profile, shell)


def _cluster(profile: Profile, shell: Shell) -> Iterator[Finding]:
    rows = shell("sinfo --noheader --format='%R %a %l %D'")
    if not rows.good:
        yield Finding("cluster", False, rows.brief)
        return
    yield _partition(profile.partition, [row.split() for row in rows.words.splitlines()])
    history = shell("sacct --noheader --allocations --parsable2 --format=JobID")
    yield Finding("sacct", history.good, "answers" if history.good else f"{history.brief}; NeMo Run follows jobs by it")
    trial = shell(f"sbatch --test-only {shlex.join(sbatch_flags(profile))} --wrap=true")
    yield Finding("a job", trial.good, "would be accepted" if trial.good else explain_text(trial.words) or trial.brief)
    if profile.container_image is not None:
        pyxis = shell("srun --help 2>&1 | grep -q -- --container-image")
        yield Finding("pyxis", pyxis.good, "there" if pyxis.good else "srun knows no --container-image; use setup")


def _partition(name: str | None, rows: list[list[str]]) -> Finding:
    known = {row[0]: row[1:] for row in rows}
    if name is None:
        return Finding("partition", bool(known), f"the cluster's default of {', '.join(known)}")
    if name not in known:
        return Finding("partition", False, f"there is none called {name!r}; {suggest(name, known)}")
    state, limit, nodes = known[name]
    return Finding("partition", state == "up", f"{name} is {state}, time limit {limit}, {nodes} node(s)")


def sbatch_flags(profile: Profile) -> list[str]:
    """Return the flags of sbatch by which a cluster tells whether it would take the profile's job."""
    flags = {
        "account": profile.account, "partition": profile.partition, "qos": profile.qos, "nodes": profile.nodes,
        "gpus-per-node": profile.gpus_per_node or None, "cpus-per-task": profile.cpus_per_task, "mem": profile.memory,
        "time": profile.time,
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in flags.items() if value is not None), *profile.sbatch]


def _directory(profile: Profile, shell: Shell) -> Finding:
    path = profile.job_dir or get_nemorun_home()
    tried = shell(_WRITABLE.format(path if path.startswith("~") else shlex.quote(path)))
    return Finding("job directory", tried.good, f"{path} {'is writable' if tried.good else tried.brief}")


def _image(image: str, shell: Shell) -> Finding:
    if not image.startswith(("/", "./", "~")):
        return Finding("image", True, f"{image} is in a registry, which is not asked")
    tried = shell(f"test -r {shlex.quote(image)}")
    return Finding("image", tried.good, f"{image} {'is readable' if tried.good else 'is not there, or not readable'}")


def _python(profile: Profile, shell: Shell) -> Finding:
    tried = shell("\n".join([*profile.setup, "python -c 'import graftwork, nemo_run; print(graftwork.__file__)'"]))
    last = tried.words.splitlines()[-1] if tried.words else "no answer"
    return Finding("python", tried.good, f"imports {last}" if tried.good else f"after the setup lines: {last}")


def _docker(profile: Profile) -> Iterator[Finding]:
    daemon = shell_here("docker version --format '{{.Server.Version}}'")
    yield Finding("daemon", daemon.good, f"docker {daemon.words}" if daemon.good else daemon.brief)
    if daemon.good:
        image = shlex.quote(str(profile.container_image))
        here = shell_here(f"docker image inspect --format '{{{{.Id}}}}' {image}")
        words = here.words if here.good else f"{profile.container_image} is not here; a launch tries to pull it"
        yield Finding("image", here.good, words)
    if profile.gpus_per_node:
        gpus = shell_here("docker info --format '{{json .Runtimes}}' | grep nvidia")
        yield Finding("gpus", gpus.good, "the NVIDIA runtime is there" if gpus.good else "no NVIDIA container runtime")
    yield _directory(profile, shell_here)


def _code(profile: Profile) -> Finding:
    try:
        return Finding("code", True, code(profile.code, profile.allow_dirty).record)
    except GraftworkError as error:
        return Finding("code", False, str(error))


def _commands(shell: Shell, names: tuple[str, ...], what: str) -> Finding:
    missing = [name for name in names if not shell(f"command -v {name}").good]
    return Finding(what, not missing, f"{', '.join(missing)} not found" if missing else f"{', '.join(names)} found")


def shell_of(profile: Profile) -> Shell:
    """Return what runs a line of shell where ``profile`` submits."""
    if profile.ssh is None:
        return shell_here
    ssh = profile.ssh
    start = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-p", str(ssh.port)]
    start += ["-i", os.path.expanduser(ssh.identity)] if ssh.identity else []
    return lambda line: _answer([*start, f"{ssh.user}@{ssh.host}", f"bash -c {shlex.quote(line)}"])


def shell_here(line: str) -> Answer:
    """Run a line of shell on this machine."""
    return _answer(["bash", "-c", line])


def _answer(command: list[str]) -> Answer:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=Path.cwd())
    except FileNotFoundError:
        return Answer(False, f"{command[0]} is not installed here")
    except subprocess.TimeoutExpired:
        return Answer(False, f"no answer within {SECONDS} s")
    said = done.stdout.strip() if done.returncode == 0 else f"{done.stderr}\n{done.stdout}".strip()
    return Answer(done.returncode == 0, said or f"exit code {done.returncode}")
