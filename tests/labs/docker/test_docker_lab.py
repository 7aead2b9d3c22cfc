"""The tiny recipe as a container run, with a real Docker daemon: the same losses, the user's files, honest ends."""

import gc
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nemo_run as run
import pytest

from graftwork import executors, recipes
from graftwork.cli.context import GraftContext
from graftwork.cli.sweep import SweepContext, sweep
from graftwork.errors import LaunchError
from graftwork.executors import launch
from graftwork.executors.docker import DEVICE
from graftwork.executors.process.life_line import held, is_held, pass_on, passed_on
from graftwork.training import finetune
from tests.cli.test_end_to_end import overrides
from tests.helpers.tiny_recipe import summary
from tests.helpers.transcript import Transcript
from tests.labs.docker.conftest import ROOT, docker

# NeMo Run leaves pipes and sockets of its commands for Python to close.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NEMORUN = str(Path(sys.executable).with_name("nemorun"))
SAME = ("train_loss", "val_loss", "steps", "trainable_parameters", "total_parameters")
WEIGHTS = "adapter/adapter_model.safetensors"
STRANGER = 12345
"""A user of whom neither this machine nor the image knows."""
END_SECONDS = 300
"""Longer than anything takes on a machine that others use too."""


def containers() -> list[str]:
    """The names of all containers that NeMo Run has started and nobody has removed."""
    return docker("ps", "--all", "--filter", "label=nemo-run/id", "--format", "{{.Names}}").split()


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No container survives its test. NeMo Run reads stdin, which pytest forbids."""
    with open(os.devnull) as empty, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        monkeypatch.setattr(sys, "stdin", empty)
        yield
        gc.collect()  # what they leave open closes here, not in the middle of another test
    until(lambda: containers() == [])  # Docker removes them a moment after they have ended


def command(inputs: Path, out: Path, *more: str) -> list[str]:
    """What is typed after ``nemorun graft finetune`` for the tiny recipe; all it writes is in ``out``."""
    fields = [field for field in overrides(inputs) if not field.startswith("data.cache_dir")]
    return [*fields, f"data.cache_dir={out / 'cache'}", *more]


def in_container(image: str, *more: str) -> list[str]:
    return ["run.executor=docker", f"run.executor.container_image={image}", *more]


def context(out: Path, name: str) -> GraftContext:
    return GraftContext(name="finetune", factory=f"smollm2_135m(dir={out},name={name})", skip_confirmation=True)


def execute(out: Path, name: str, arguments: list[str]) -> None:
    """Run the command line in this process."""
    context(out, name).cli_execute(finetune, arguments)


@pytest.fixture(scope="module")
def here(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a training in this process."""
    out = tmp_path_factory.mktemp("here")
    execute(out, "run", command(inputs, out))
    return out / "run"


@pytest.mark.slow
@pytest.mark.processes
def test_a_container_gives_the_losses_and_the_adapter_of_this_process(
    docker_lab: str, inputs: Path, here: Path, tmp_path: Path
) -> None:
    made = recipes.smollm2_135m.finetune_recipe(dir=str(tmp_path), name="run")
    recipes.save(run.cli.parse_cli_args(made, command(inputs, tmp_path)), tmp_path / "run.yaml")
    typed = ["nemorun", "graft", "finetune", "--file", "run.yaml", *in_container(docker_lab), "--yes"]
    done = subprocess.run([NEMORUN, *typed[1:]], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shell = Transcript({str(tmp_path): "/home/me", str(inputs): "/home/me/data", docker_lab: "graftwork:cpu"})
    shell.add(shlex.join(typed), done.stdout)
    shell.check("docker.md", "docker")
    ours, theirs = summary(here), summary(tmp_path / "run")
    assert {key: ours[key] for key in SAME} == {key: theirs[key] for key in SAME}
    assert (here / WEIGHTS).read_bytes() == (tmp_path / "run" / WEIGHTS).read_bytes()


@pytest.mark.slow
@pytest.mark.processes
def test_a_user_nobody_knows_submits_and_owns_the_results(
    docker_lab: str, inputs: Path, here: Path, tmp_path: Path
) -> None:
    """The launcher runs as that user in a container of its own: this user's Python need not be readable to others."""
    os.chown(tmp_path, STRANGER, STRANGER)
    socket = Path("/var/run/docker.sock")
    mounts = [f"{socket}:{socket}", f"{inputs}:{inputs}:ro", f"{tmp_path}:{tmp_path}"]
    flags = [flag for mount in mounts for flag in ("--volume", mount)]
    flags += ["--user", f"{STRANGER}:{STRANGER}", "--group-add", str(socket.stat().st_gid), "--network", "host"]
    flags += ["--env", f"HOME={tmp_path}", "--env", f"NEMORUN_HOME={tmp_path / 'jobs'}", "--workdir", str(tmp_path)]
    factory = f"smollm2_135m(dir={tmp_path},name=run)"
    typed = ["nemorun", "graft", "finetune", "--factory", factory, "--yes"]
    docker(
        "run", "--rm", *flags, docker_lab, *typed, *command(inputs, tmp_path, *in_container(docker_lab)), timeout=300
    )
    assert (here / WEIGHTS).read_bytes() == (tmp_path / "run" / WEIGHTS).read_bytes()
    written = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert (tmp_path / "run" / "summary.json") in written
    assert {(path.stat().st_uid, path.stat().st_gid) for path in written} == {(STRANGER, STRANGER)}


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_run_the_code_of_the_commit_and_give_one_rank_s_losses(
    docker_lab: str, inputs: Path, here: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(repository)
    two = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy.tensor_model_parallel_size=2"]
    arguments = command(inputs, tmp_path, *two, *in_container(docker_lab, "run.executor.code=git"))
    execute(tmp_path, "run", arguments)
    assert "the commit runs" in capfd.readouterr().out
    one, ranks = summary(here), summary(tmp_path / "run")
    for loss in ("train_loss", "val_loss"):
        assert ranks[loss] == pytest.approx(one[loss], rel=1e-4)
    assert ranks["trainable_parameters"] == one["trainable_parameters"]


@pytest.mark.slow
@pytest.mark.processes
def test_a_sweep_is_a_container_for_each_run(docker_lab: str, inputs: Path, here: Path, tmp_path: Path) -> None:
    sweeping = SweepContext(name="sweep", factory=f"smollm2_135m(dir={tmp_path},name=run)", skip_confirmation=True)
    rates = ["sweep.optim.lr=[2e-3,1e-3]", "parallel=2"]
    sweeping.cli_execute(sweep, [*command(inputs, tmp_path, *in_container(docker_lab)), *rates])
    runs = [tmp_path / "run" / name for name in ("lr-0.002", "lr-0.001")]
    assert summary(runs[0])["val_loss"] == summary(here)["val_loss"] != summary(runs[1])["val_loss"]
    assert (runs[0] / WEIGHTS).read_bytes() == (here / WEIGHTS).read_bytes()


def refused(out: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run the command line where it fails; return its exit code and the one line it says."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        execute(out, "run", arguments)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return int(str(ended.value.code)), lines[0]


@pytest.mark.slow
@pytest.mark.processes
def test_what_a_recipe_reads_cannot_be_written_to(docker_lab: str, inputs: Path) -> None:
    config = inputs / "base" / "config.json"
    before = config.read_bytes()
    writing = run.Partial(zipfile.ZipFile, file=str(config), mode="w")
    with pytest.raises(LaunchError, match="(?s)ended as FAILED.*Read-only file system"):
        launch(writing, executors.docker(container_image=docker_lab), tail=False)
    assert config.read_bytes() == before


@pytest.mark.processes
def test_a_failing_task_ends_with_its_own_sentence(
    docker_lab: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"input": "Question without an answer"}\n')
    bad = [f"data.train={tmp_path / 'bad.jsonl'}", "data.validation_fraction=0.0"]
    code, line = refused(tmp_path, command(inputs, tmp_path, *bad, *in_container(docker_lab)), capfd)
    assert code == 2 and "bad.jsonl" in line and "'output'" in line
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_missing_image_is_named_with_its_neighbours(
    docker_lab: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(tmp_path, command(inputs, tmp_path, *in_container("graftwork-lab:cpi")), capfd)
    assert code == 2
    assert line.startswith("error: container_image='graftwork-lab:cpi' is not on this machine, and pulling it fails (")
    assert "; did you mean 'graftwork-lab:cpu'" in line
    assert not (tmp_path / "run").exists()


def test_a_missing_daemon_is_one_sentence(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
        code, line = refused(tmp_path, command(inputs, tmp_path, *in_container("graftwork-lab:cpu")), capfd)
    assert code == 1 and line.startswith("error: no Docker daemon answers (") and line.endswith("may you use it?")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(DEVICE.exists(), reason="this machine has GPUs to give")
def test_gpus_are_asked_for_only_where_there_are_any(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = in_container("graftwork-lab:cpu", "run.executor.gpus_per_node=1")
    code, line = refused(tmp_path, command(inputs, tmp_path, *more), capfd)
    assert code == 2 and "this machine has no NVIDIA driver" in line


def launched(inputs: Path, out: Path, image: str) -> subprocess.Popen[str]:
    """Start a run of many steps from a shell of its own, and return once its container trains."""
    factory = f"smollm2_135m(dir={out},name=run)"
    many = ["trainer.max_steps=100000", "trainer.val_check_interval=50000", *in_container(image)]
    typed = [NEMORUN, "graft", "finetune", "--factory", factory, "--yes", *command(inputs, out, *many)]
    process = subprocess.Popen(
        typed, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        until(lambda: bool(list((out / "run").rglob("metrics.csv"))), process)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process


def until(true: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something to become true; a process that ends before that fails the test with what it printed."""
    end = time.monotonic() + END_SECONDS
    while not true():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"not after {END_SECONDS} seconds"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_container_saves_its_state_and_ends_with_its_launcher(
    docker_lab: str, inputs: Path, tmp_path: Path, number: int
) -> None:
    process = launched(inputs, tmp_path, docker_lab)
    process.send_signal(number)
    told, _ = process.communicate(timeout=END_SECONDS)
    until(lambda: containers() == [])
    assert process.returncode == (75 if number == signal.SIGTERM else -number), told
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_life_line_tells_of_its_holder_and_of_signals(tmp_path: Path) -> None:
    with held(tmp_path) as line:
        assert is_held(line) and passed_on(line) == []
        assert pass_on(tmp_path, signal.SIGTERM) and pass_on(tmp_path, signal.SIGINT)
        assert passed_on(line) == [signal.SIGTERM, signal.SIGINT]
    assert not is_held(line)
    line.unlink()
    assert not is_held(line) and passed_on(line) == [] and not pass_on(tmp_path, signal.SIGTERM)
