"""The batch script, word for word; what it says is what a submission submits, and bash reads it as it is meant."""

import gc
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

import graftwork.cli  # noqa: F401  registers recipes and methods
from graftwork.cli.sweep import SweepContext
from graftwork.cli.sweep import sweep as typed_sweep
from graftwork.errors import ConfigError, LaunchError
from graftwork.executors import launch, slurm, sweep
from graftwork.executors.submission.script import script_of, script_of_array
from graftwork.recipes import grid, llama2_7b
from tests.helpers.tasks import write_ranks

# NeMo Run's commands leave their pipes open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

GOLDEN = Path(__file__).parents[1] / "golden" / "scripts"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAFTWORK_PROFILE", raising=False)
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # NeMo Run's commands read it
    yield
    gc.collect()


def recipe(**sizes: int) -> run.Partial:
    return llama2_7b.finetune_recipe(dir="/shared/runs", **sizes)


def normal(script: str, tmp_path: Path) -> str:
    """Return a script without what differs from call to call and from machine to machine."""
    script = script.replace(str(tmp_path), "/HERE").replace(os.path.dirname(sys.executable), "/PYTHON")
    return re.sub(r"_\d{19}\b", "_NUMBER", re.sub(r"graftwork \d+\.\d+\.\d+\S*?'", "graftwork VERSION'", script))


SCRIPTS: dict[str, Callable[[], tuple[run.Partial, run.Executor]]] = {
    "slurm_plain": lambda: (
        recipe(num_nodes=2, num_gpus_per_node=4),
        slurm(
            account="lab_nlp", partition="gpu", qos="long", gpus_per_node=8, cpus_per_task=6, memory="64G",
            time="1-12:00:00", requeues=3, setup=["module load cuda", "source /shared/venv/bin/activate"],
            env={"HF_HOME": "/shared/hugging face", "https_proxy": "http://proxy:1"},
            sbatch=["--exclusive", "--reservation=night"], srun=["--cpu-bind=cores"],
        ),
    ),
    "slurm_container": lambda: (
        recipe(num_nodes=2, num_gpus_per_node=2),
        slurm(
            gpus_per_node=8, launcher="torchrun", container_image="/shared/graftwork.sqsh", warning=0,
            container_mounts=["/shared:/shared", "/models:/models:ro"], env={"NCCL_DEBUG": "WARN"},
        ),
    ),
    "slurm_one": lambda: (recipe(), slurm()),
    "slurm_ssh": lambda: (recipe(), slurm(host="login", user="me", job_dir="/shared/jobs", time="30")),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_word_for_word(name: str, tmp_path: Path) -> None:
    task, executor = SCRIPTS[name]()
    found = normal(script_of(task, executor, "train"), tmp_path)
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("GRAFTWORK_WRITE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()
    assert subprocess.run(["bash", "-n"], input=found, text=True, capture_output=True).stderr == ""
    assert not list((tmp_path / "home").glob("experiments/*"))


def stub(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of Slurm's names, of which sbatch keeps what it is given."""
    folder = tmp_path / "bin"
    stub(folder, "sbatch", f'cp "${{@: -1}}" {tmp_path}/submitted; echo 17')
    for name in ("sacct", "scancel", "srun"):
        stub(folder, name, "true")
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))
    return folder


def test_a_submission_submits_this_very_script(commands: Path, tmp_path: Path) -> None:
    executor = slurm(account="a", requeues=1, env={"A": "b c"}, job_dir=str(tmp_path / "jobs"))
    shown = script_of(recipe(), executor, "train")
    launch(recipe(), executor, "train", wait=False, tail=False)
    submitted = (tmp_path / "submitted").read_text()
    assert normal(submitted, tmp_path) == normal(shown, tmp_path)
    assert f"{tmp_path}/jobs/experiments/train/" in submitted


def test_a_sweep_submits_this_very_array(commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text("")
    executor = slurm(account="a", job_dir=str(tmp_path / "jobs"))
    recipes = grid(recipe(), {"optim.lr": [1e-4, 1e-3, 1e-2]})
    shown = script_of_array(recipes, executor, "rates", parallel=2)
    assert "#SBATCH --array=0-2%2" in shown
    sweep(recipes, executor, "rates", parallel=2, wait=False)
    assert normal((tmp_path / "submitted").read_text(), tmp_path) == normal(shown, tmp_path)
    typed = ["sweep.optim.lr=[1e-4,1e-3]", "parallel=1", "run.executor=slurm", "run.executor.account=a"]
    SweepContext(name="sweep", factory="llama2_7b", dryrun=True).cli_execute(typed_sweep, typed)
    assert "#SBATCH --array=0-1%1" in capsys.readouterr().out


def test_a_refusal_is_one_sentence_and_leaves_nothing(commands: Path, tmp_path: Path) -> None:
    stub(commands, "sbatch", "echo 'sbatch: error: invalid partition specified: gup' >&2\n"
         "echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2\nexit 1")  # fmt: skip
    with pytest.raises(LaunchError) as caught:
        launch(recipe(), slurm(partition="gup"), "train", wait=False, tail=False)
    assert str(caught.value).endswith(
        "Slurm refused the job: Invalid partition name specified; invalid partition specified: gup; "
        "'sinfo -s' lists the partitions."
    )
    assert "\n" not in str(caught.value) and not list((tmp_path / "home").glob("experiments/train/*"))


def test_without_slurm_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="'sbatch' is not on PATH: slurm submits from a login node.* or over ssh"):
        launch(recipe(), slurm(), "train", wait=False)
    assert not (tmp_path / "home").exists()


def played(executor: run.SlurmExecutor, tmp_path: Path, **srun: str) -> subprocess.CompletedProcess[str]:
    """Run a script with bash: its commands are ours, the last one prints the environment and ends as ``srun`` says."""
    folder = tmp_path / "played"
    stub(folder, "scontrol", f'[ "$1" = requeue ] && echo "$2" >> {tmp_path}/requeued; echo node1')
    stub(folder, "srun", f'[[ "$*" = *hostname* ]] || {{ env; {srun.get("does", "true")}; }}')
    script = tmp_path / "script.sh"
    script.write_text(script_of(run.Partial(write_ranks, directory="/x"), executor, "train"))
    (tmp_path / "requeued").unlink(missing_ok=True)
    with (tmp_path / "output").open("w") as output:
        return subprocess.run(
            ["bash", str(script)], stdout=output, stderr=output, text=True,
            env={"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/home/me", "SLURM_JOB_ID": "17", **srun.get("env", {})},
        )  # fmt: skip


def test_variables_reach_the_job_as_they_are(tmp_path: Path) -> None:
    values = {"WORDS": "two  words", "MONEY": "$HOME $$ ${x}", "QUOTES": 'it\'s "so"', "lower": "a;b", "EMPTY": ""}
    assert played(slurm(env=values), tmp_path).returncode == 0
    lines = (tmp_path / "output").read_text().splitlines()
    assert [name for name, value in values.items() if f"{name}={value}" not in lines] == []
    assert next(line for line in lines if line.startswith("PATH=")).startswith(
        f"PATH={os.path.dirname(sys.executable)}:"
    )


@pytest.mark.parametrize(
    ("does", "count", "again"),
    [
        ("exit 75", "", True),
        ("echo 'srun: error: n1: task 0: Exited with exit code 75' >&2; exit 137", "", True),
        ("exit 75", "2", True),
        ("exit 75", "3", False),
        ("echo 'srun: error: n1: task 0: Exited with exit code 1' >&2; exit 1", "", False),
        ("true", "", False),
    ],
    ids=["saved", "saved, the other rank killed", "third time", "often enough", "crashed", "finished"],
)
def test_a_run_that_saved_its_state_goes_back_into_the_queue(
    does: str, count: str, again: bool, tmp_path: Path
) -> None:
    environment: Any = {"SLURM_RESTART_COUNT": count} if count else {}
    ended = played(slurm(requeues=3), tmp_path, does=does, env=environment)
    assert (tmp_path / "requeued").exists() == again
    assert (ended.returncode == 0) == (does == "true")


def test_without_requeues_none_happens(tmp_path: Path) -> None:
    assert played(slurm(), tmp_path, does="exit 75").returncode == 75 and not (tmp_path / "requeued").exists()


def test_what_cannot_work_is_refused_when_the_executor_is_made() -> None:
    for wrong, message in {
        "launcher": "input should be 'srun' or 'torchrun'", "time": "does not fit", "code": "'installed' or 'git'",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            slurm(**{wrong: "nonsense"})
    with pytest.raises(ConfigError, match="ssh needs job_dir"):
        slurm(host="login", user="me")
