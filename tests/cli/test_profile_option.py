"""--profile and run.executor.* reach the executor's own fields; a dry run shows the script."""

import gc
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork.cli.context import GraftContext, with_profile
from graftwork.errors import ConfigError
from graftwork.training import finetune

# NeMo Run's commands leave their pipes open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAFTWORK_PROFILE", raising=False)
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # NeMo Run's commands read it
    (tmp_path / "cluster.yaml").write_text(
        "small: {partition: debug}\nbig: {partition: gpu, gpus_per_node: 8, time: 12:00:00}\n"
        "box: {executor: docker, container_image: i}\n"
    )
    yield
    gc.collect()


def dry_run(*args: str, factory: str = "llama2_7b(num_gpus_per_node=4)") -> None:
    GraftContext(name="train", factory=factory, dryrun=True).cli_execute(finetune, list(args))


def test_a_dry_run_ends_with_the_script_of_the_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dry_run("--profile", "big", "run.executor.time=30", "trainer.max_steps=7")
    recipe, _, script = capsys.readouterr().out.partition("\n\n#!/bin/bash\n")
    assert "trainer.max_steps = 7" in recipe.splitlines()
    flags = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"partition=gpu", "gpus-per-node=4", "ntasks-per-node=4", "nodes=1", "time=30"} <= set(flags)
    dry_run("run.executor=slurm")
    assert "#SBATCH --partition=debug\n" in capsys.readouterr().out  # the first that is for slurm
    assert not list((tmp_path / "home").glob("experiments/*/*"))


def test_the_executor_of_a_profile_need_not_be_named() -> None:
    assert with_profile([], None) == []
    assert with_profile(["run.executor.time=1"], "box") == [
        "run.executor=docker", "run.executor.time=1", "run.executor.profile=box",
    ]  # fmt: skip
    assert with_profile(["run.executor=slurm"], "x") == ["run.executor=slurm", "run.executor.profile=x"]
    with pytest.raises(ConfigError, match="has no profile 'bigg'; did you mean 'big'"):
        with_profile([], "bigg")


WRONG = {
    "a field": (["run.executor=slurm", "run.executor.patition=x"], "executor 'slurm' has no field 'patition'; did you"),
    "a value": (["run.executor=slurm", "run.executor.time=soon"], "time: 'soon' does not fit; valid: '30' (minutes)"),
    "a profile": (["--profile", "bigg"], "has no profile 'bigg'; did you mean 'big'"),
    "another's profile": (["run.executor=slurm", "--profile", "box"], "is for docker, not for slurm."),
    "ranks": (["run.executor=slurm", "run.executor.ntasks_per_node=2"], "trainer.devices=4, but the executor ntasks_"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, message = WRONG[case]
    with pytest.raises(SystemExit) as exit_:
        dry_run(*args)
    error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(error) == 1 and message in error[0]
