"""GraftContext: what ran decides the exit code; no training runs unasked."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from graftwork.cli.context import GraftContext, executor_for, one_line_errors
from graftwork.errors import DataError
from graftwork.executors import local
from graftwork.recipes import smollm2_135m
from graftwork.training import finetune
from tests.helpers.tasks import answer_rows, ask, write_ranks


def execute(*args: str, **options: Any) -> None:
    GraftContext(name="task", **{"skip_confirmation": True, **options}).cli_execute(write_ranks, list(args))


def code(*args: str, **options: Any) -> Any:
    with pytest.raises(SystemExit) as exit_:
        execute(*args, **options)
    return exit_.value.code


def test_a_verb_runs_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    execute(f"directory={tmp_path}")
    assert (tmp_path / "rank7").exists()


@pytest.mark.parametrize("where", [[], ["run.executor=local"]], ids=["in process", "local executor"])
def test_a_user_error_is_one_line_and_exit_2(
    where: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(f"directory={tmp_path}", "fail=data", *where) == 2
    err = capsys.readouterr().err
    assert err == "error: train.jsonl, line 3: field 'output' is missing; valid: input, output.\n"


def test_a_failed_task_is_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ["run.executor=local", "run.executor.ntasks=2"]
    assert code(f"directory={tmp_path}", "fail=bug", *two) == 1
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank0", "rank1"]


def test_a_bug_in_this_process_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        execute(f"directory={tmp_path}", "fail=bug")


def test_a_dry_run_shows_the_task_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(f"directory={tmp_path}", dryrun=True)
    assert f"directory = '{tmp_path}'" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_without_a_terminal_no_training_runs_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        GraftContext(name="ask").cli_execute(ask, ["trainer=1"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and "add --yes" in err and "asked" not in out


@pytest.mark.parametrize("answer", [True, False])
def test_the_answer_decides(answer: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda question: answer)
    context = GraftContext(name="ask")
    if answer:
        context.cli_execute(ask, ["trainer=1"])
    else:
        with pytest.raises(SystemExit) as exit_:
            context.cli_execute(ask, ["trainer=1"])
        assert exit_.value.code == 0
    assert ("asked" in capsys.readouterr().out) == answer


def test_results_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    GraftContext(name="answer").cli_execute(answer_rows, ["count=2"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"output": "é 0"}, {"output": "é 1"}]


def test_a_result_is_not_lost_on_an_executor(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        GraftContext(name="answer").cli_execute(answer_rows, ["count=2", "run.executor=local"])
    assert exit_.value.code == 2 and "set output=FILE" in capsys.readouterr().err


def test_a_missing_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert code() == 2
    assert "write_ranks needs directory: set directory=..." in capsys.readouterr().err


def test_export_writes_the_task_and_runs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "task.yaml"
    execute(f"directory={tmp_path}", to_yaml=str(out))
    assert str(tmp_path) in out.read_text() and [p.name for p in tmp_path.iterdir()] == ["task.yaml"]


def test_one_device_needs_no_executor_and_several_get_torchrun() -> None:
    assert executor_for(smollm2_135m.finetune_recipe()) is None
    assert executor_for(run.Partial(write_ranks)) is None
    executor = executor_for(smollm2_135m.finetune_recipe(num_gpus_per_node=3))
    assert (executor.nproc_per_node(), executor.launcher) == (3, local(3).launcher)


@pytest.mark.parametrize("how", ["dryrun", "skip_confirmation"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.accelerator=gpu", "trainer.accelerator='gpu', but this machine has no GPU; valid: 'cpu' or 'auto'."),
        ("trainer.devices=2 trainer.strategy.tensor_model_parallel_size=3", "tensor_model_parallel_size"),
        ("run.executor=local trainer.num_nodes=2", "trainer.num_nodes=2"),
    ],
)
def test_what_cannot_be_placed_is_one_line_before_anything_starts(
    override: str, message: str, how: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    context = GraftContext(name="finetune", factory=f"smollm2_135m(dir={tmp_path})", **{how: True})
    with pytest.raises(SystemExit) as exit_:
        context.cli_execute(finetune, ["data.train=train.jsonl", *override.split()])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and len(err.splitlines()) == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_for_gpus_elsewhere_needs_none_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())  # invoke reads along, which pytest forbids
    elsewhere = ["run.executor=slurm", "trainer.accelerator=gpu", "data.train=train.jsonl"]
    GraftContext(name="finetune", factory="smollm2_135m", dryrun=True).cli_execute(finetune, elsewhere)
    assert "trainer.accelerator = 'gpu'" in capsys.readouterr().out


def test_people_are_told_where_to_read_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second line on a terminal; a program or a log gets one."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(SystemExit), one_line_errors():
        raise DataError("train.jsonl, line 3: field 'output' is missing; valid: input, output.")
    assert capsys.readouterr().err.splitlines()[1:] == ["see: docs/troubleshooting.md#dataerror"]
