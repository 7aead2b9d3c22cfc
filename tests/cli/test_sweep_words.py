"""``nemorun graft sweep``: lists of values in the grammar of an override, and what it says of mistakes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import graftwork.cli  # noqa: F401  registers recipes and methods
from graftwork.cli.sweep import SweepContext, split_values, sweep
from tests.helpers import tiny_run


def execute(*args: str, **options: Any) -> None:
    settings: dict[str, Any] = {"name": "sweep", "factory": "smollm2_135m", "dryrun": True} | options
    SweepContext(**settings).cli_execute(sweep, list(args))


def listed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out = capsys.readouterr().out.splitlines()
    return [line.strip() for line in out[next(i for i, line in enumerate(out) if " runs below " in line) :]]


SPLIT = {
    "8,16": ["8", "16"],
    " 1e-4 , 1e-3 ": ["1e-4", "1e-3"],
    "lora(dim=8,alpha=1),[lora,ptuning(name='a,b')],None": [
        "lora(dim=8,alpha=1)",
        "[lora,ptuning(name='a,b')]",
        "None",
    ],
    "'a, b',\"c]\"": ["'a, b'", '"c]"'],
    "": [],
}


@pytest.mark.parametrize("text", SPLIT)
def test_values_are_split_outside_of_brackets_and_quotes(text: str) -> None:
    assert split_values(text) == SPLIT[text]


def test_a_dry_run_lists_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    execute("sweep.peft[0].dim=[8,16]", "sweep.optim.lr=[1e-4,1e-3]", "seed=7")
    assert listed(capsys) == [
        "4 runs below runs/default:",
        "dim-8_lr-0.0001", "dim-8_lr-0.001", "dim-16_lr-0.0001", "dim-16_lr-0.001",
    ]  # fmt: skip


def test_values_may_be_methods_strings_and_switches(capsys: pytest.CaptureFixture[str]) -> None:
    execute("sweep.peft=[lora(dim=8),[lora,ptuning],None]", "sweep.data.add_bos=[True,False]")
    names = listed(capsys)[1:]
    assert [name.partition("_add_bos-")[0] for name in names[::2]] == [
        "peft-lora.dim-8",
        "peft-lora+ptuning",
        "peft-None",
    ]
    assert {name.partition("_add_bos-")[2] for name in names} == {"True", "False"}
    execute("sweep.peft=[lora,dora]", "sweep.peft[0].dim=[4]")
    assert listed(capsys)[1:] == ["peft-lora_dim-4", "peft-dora_dim-4"]


MISTAKES = {
    "nothing": ([], "a sweep needs a field with values, for example sweep.optim.lr=[1e-4,1e-3]."),
    "no list": (["sweep.optim.lr=1e-3"], "sweep.optim.lr=1e-3 is no axis; write sweep.FIELD=[VALUE,VALUE]."),
    "no value": (["sweep.optim.lr=[]"], "the grid's optim.lr is []; a list of values is valid."),
    "misspelt": (["sweep.optim.rl=[1]"], "optim has no field 'rl'; did you mean 'lr'"),
    "type": (["sweep.peft[0].dim=[8,many]"], "peft[0].dim=many is not valid: a value of type int is expected."),
    "method": (["sweep.peft=[lora,lorra]"], "no peft is called 'lorra'; did you mean 'lora'"),
    "value": (["sweep.peft[0].dim=[8,-1]"], "dim"),
    "twice": (["sweep.optim.lr=[1]", "sweep.optim.lr=[2]"], "sweep.optim.lr is given twice; once is valid."),
    "same": (["sweep.optim.lr=[1e-3,0.001]"], "two runs of the grid would be called 'lr-0.001'"),
    "parallel": (["sweep.optim.lr=[1e-3]", "parallel=two"], "parallel='two' is no number of runs"),
    "other": (["sweep.optim.lr=[1e-3]", "trainer.max_stesp=3"], "trainer has no field 'max_stesp'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args, said = MISTAKES[kind]
    with pytest.raises(SystemExit) as exit_:
        execute(*args, f"trainer.default_root_dir={tmp_path / 'runs'}")
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not list(tmp_path.iterdir())


def test_without_a_terminal_no_sweep_runs_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        execute("sweep.optim.lr=[1e-3]", dryrun=False)
    assert exit_.value.code == 2 and "add --yes" in capsys.readouterr().err


@pytest.mark.slow
def test_sweep_and_compare_from_the_shell(tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path)
    shape = [f"model.shape.{field}={value}" for field, value in vars(tiny_run.SHAPE).items() if type(value) is int]
    words = [
        "sweep", "--factory", "smollm2_135m", "sweep.peft[0].dim=[2,4]", "parallel=2", "--yes",
        "model.checkpoint=None", "model.dtype=fp32", *shape,
        "trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.accelerator=cpu",
        "data.train=train.jsonl", "data.tokenizer=tokenizer", "data.validation_fraction=0.25", "data.seq_length=48",
    ]  # fmt: skip
    done = nemorun(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] dim-4: finished, val_loss " in done.stdout
    table = [line.split() for line in done.stdout.splitlines() if line.split()[1:2] in (["dim-2"], ["dim-4"])]
    assert [row[0] for row in table] == ["1", "2"] and {row[-1] for row in table} == {"2", "4"}
    again = nemorun(tmp_path, "compare", "runs/default/dim-2", "runs/default/dim-4", "output=runs.html")
    assert again.returncode == 0, again.stderr
    assert [line.split() for line in again.stdout.splitlines() if "dim-" in line] == table
    assert (tmp_path / "runs.html").read_text().startswith("<!doctype html>")
    wrong = nemorun(tmp_path, "compare", "rnus")
    assert wrong.returncode == 2 and wrong.stderr == "error: there is no directory 'rnus'; did you mean 'runs'?\n"


def nemorun(directory: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    program = str(Path(sys.executable).with_name("nemorun"))
    return subprocess.run([program, "graft", *words], cwd=directory, capture_output=True, text=True, timeout=900)
