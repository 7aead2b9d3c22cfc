"""The real command line on a tiny random base: train here and on an executor, evaluate, generate, fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.cli.context import GraftContext
from graftwork.inference import evaluate, generate
from graftwork.training import finetune
from tests.helpers import tiny_recipe
from tests.helpers.tiny_recipe import make_place, summary

NEMORUN = str(Path(sys.executable).with_name("nemorun"))
ROOT = Path(__file__).parents[2]
STACK = ["peft=[lora(dim=4),ptuning(virtual_tokens=3)]"]
TALK = ("litlogger", "GPU available", "Tip:")
"""Lightning's own words, which nobody needs."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("e2e"))


def overrides(place: Path) -> list[str]:
    return [*tiny_recipe.overrides(place, 4), "data.micro_batch_size=4", *STACK]


def context(place: Path, name: str) -> GraftContext:
    factory = f"smollm2_135m(dir={place},name={name})"
    return GraftContext(name="finetune", factory=factory, skip_confirmation=True)


@pytest.fixture(scope="module")
def here(place: Path) -> Path:
    """The run directory of a training in this process."""
    context(place, "here").cli_execute(finetune, overrides(place))
    return place / "here"


def nemorun(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([NEMORUN, "graft", *args], capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)


def test_the_same_recipe_gives_the_same_losses_here_and_on_an_executor(
    here: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context(place, "there").cli_execute(finetune, [*overrides(place), "run.executor=local"])
    said = capfd.readouterr()
    assert "step 4" in said.out and not [words for words in TALK if words in said.out + said.err]
    ours, theirs = summary(here), summary(place / "there")
    same = ("train_loss", "val_loss", "steps", "trainable_parameters", "total_parameters")
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    weights = "adapter/adapter_model.safetensors"
    assert (here / weights).read_bytes() == (place / "there" / weights).read_bytes()
    assert ours["recipe_sha256"] != theirs["recipe_sha256"]  # they differ in their directory


@pytest.mark.processes
def test_two_devices_start_two_ranks_and_give_one_rank_s_losses(here: Path, place: Path) -> None:
    two = [
        "trainer.devices=2",
        "trainer.strategy.tensor_model_parallel_size=2",
        "trainer.strategy.sequence_parallel=True",
    ]
    context(place, "two").cli_execute(finetune, [*overrides(place), "trainer.accelerator=cpu", *two])
    one, two_ranks = summary(here), summary(place / "two")
    for loss in ("train_loss", "val_loss"):
        assert two_ranks[loss] == pytest.approx(one[loss], rel=1e-4)
    assert two_ranks["trainable_parameters"] == one["trainable_parameters"]


def test_a_trained_adapter_is_evaluated_and_answers(
    here: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = f"base={place / 'base'}", f"adapter={here / 'adapter'}"
    figures = place / "figures.json"
    GraftContext(name="evaluate").cli_execute(
        evaluate, [base, adapter, f"data={place / 'train.jsonl'}", "limit=8", "baseline=True", f"output={figures}"]
    )
    metrics = json.loads(figures.read_text())
    assert metrics["rows"] == 8 and metrics["loss"] < metrics["baseline"]["loss"]
    assert json.loads(capsys.readouterr().out)["loss"] == metrics["loss"]
    GraftContext(name="generate").cli_execute(
        generate, [base, adapter, "prompts=['Question 1 about the sun','Hello, you']", "max_new_tokens=3"]
    )
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["input"] for a in answers] == ["Question 1 about the sun", "Hello, you"]


BAD = {
    "missing file": (["data.train=no.jsonl"], "data file 'no.jsonl' does not exist"),
    "missing base": (["model.checkpoint=/no/base"], "'/no/base' is no checkpoint directory"),
    "wrong value": (["peft=[lora(dropout=2.0)]"], "LoRA 'lora': dropout must be in [0, 1), got 2.0."),
    "unmatched target": (["peft[0].target_modules=['linear_qvk']"], "linear_qvk"),
    "wrong layout": (["trainer.strategy.tensor_model_parallel_size=2"], "tensor_model_parallel_size=2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(
    case: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    extra, message = BAD[case]
    with pytest.raises(SystemExit) as exit_:
        context(place, case.replace(" ", "_")).cli_execute(finetune, [*overrides(place), *extra])
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 2 and len(err) == 1 and message in err[0] and "Fiddle" not in err[0]
    assert not (place / case.replace(" ", "_") / "adapter").exists()


def test_a_typo_in_the_shell_is_one_line_and_exit_2() -> None:
    done = nemorun("finetune", "--factory", "smollm2_135m", "trainer.max_stepz=60", "--yes")
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: trainer has no field 'max_stepz'; did you mean 'max_steps'")


def test_help_in_the_shell_lists_recipes_and_executors() -> None:
    done = nemorun("finetune", "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("smollm2_135m", "llama2_70b", "local", "--factory", "peft="))


def test_a_dry_run_in_the_shell_prints_every_field_and_runs_nothing(tmp_path: Path) -> None:
    done = nemorun("finetune", "--factory", f"llama2_70b(dir={tmp_path})", "peft=[lora(dim=4),ia3]", "--dryrun")
    assert done.returncode == 0, done.stderr
    assert "global options" not in done.stdout
    assert "peft[0].dim = 4" in done.stdout and "peft[1] = graftwork.peft.ia3.IA3" in done.stdout
    assert not list(tmp_path.iterdir())
