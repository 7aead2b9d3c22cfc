"""Recipe files are data: a stranger's file runs nothing, a damaged one is one sentence."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from graftwork.cli.context import GraftContext
from graftwork.cli.recipe_file import names_code
from graftwork.recipes import RECIPES, smollm2_135m
from graftwork.recipes.allowed import TRUST, targets
from graftwork.training import finetune
from tests.fuzz.mutations import draw, mutate, mutate_json


class Parsed(GraftContext):
    """Keeps the task instead of running it."""

    def execute(self, task: run.Partial) -> None:
        self.__dict__["task"] = task


def parse(*args: str, **options: Any) -> Any:
    context = Parsed(name="finetune", skip_confirmation=True, **options)
    context.cli_execute(finetune, list(args))
    return context.task


def put(tmp_path: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.fault(
    "a recipe that was written to a file loses fields when it is read back",
    "NeMo Run cannot read what it writes: such a file is refused with what to do instead",
)
def test_a_record_of_a_whole_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    GraftContext(name="finetune", factory="smollm2_135m", to_yaml=str(path)).cli_execute(finetune, [])
    for options in ({"yaml": str(path)}, {"yaml": str(path), "factory": "smollm2_135m"}, {"factory": f"@{path}"}):
        with pytest.raises(SystemExit):
            parse(**options)
        assert "--factory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(yaml=str(put(tmp_path, "peft:\n- dim: 4\n")), factory="smollm2_135m")
    assert "write its items as text" in capsys.readouterr().err


def test_every_part_of_every_recipe_may_be_named() -> None:
    def parts(config: Any) -> list[Any]:
        if isinstance(config, list):
            return [inner for one in config for inner in parts(one)]
        if not isinstance(config, run.Config | run.Partial):
            return []
        return [config.__fn_or_cls__, *(inner for one in config.__arguments__.values() for inner in parts(one))]

    for recipe in RECIPES.values():
        assert {f"{one.__module__}.{one.__qualname__}" for one in parts(recipe.finetune_recipe())} <= targets().keys()


def test_overrides_in_a_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    fields = "trainer:\n  max_steps: 7\ndata:\n  train: test.jsonl\npeft: '[lora(dim=4), ptuning]'\n"
    task = parse(factory="smollm2_135m(name=x)", yaml=str(put(tmp_path, fields)))
    assert task == parse(
        "trainer.max_steps=7", "data.train=test.jsonl", "peft=[lora(dim=4), ptuning]", factory="smollm2_135m(name=x)"
    )
    part = put(tmp_path, "seq_length: 7\n", "data.yaml")
    assert parse(f"data=@{part}", factory="smollm2_135m") == parse("data.seq_length=7", factory="smollm2_135m")
    assert (task.trainer.max_steps, task.data.train, task.trainer.default_root_dir) == (7, "test.jsonl", "runs/x")


RUN = "os.system('touch ran')"
HOSTILE = {
    "target": "_target_: os.system\ncommand: touch ran\n",
    "nested target": "model:\n  _target_: subprocess.Popen\n  args: [touch, ran]\n",
    "re-exported target": "model:\n  _target_: graftwork.atomic.os.system\n  command: touch ran\n",
    "writing target": "model:\n  _target_: graftwork.atomic.atomic_write_text\n  path: ran\n  text: x\n",
    "factory": f"data:\n  _factory_: {json.dumps(RUN)}\n",
    "dotted factory": "data:\n  _factory_: os.getcwd\n",
    "factory's argument": f'data:\n  _factory_: "smollm2_135m(name={RUN})"\n',
    "run's factory": f"run:\n  factory: {json.dumps(RUN)}\n",
    "value": f"data:\n  train: {json.dumps(RUN)}\n",
    "dotted value": "data:\n  train: os.getcwd\n",
    "value in a list": f"peft: {json.dumps(f'[{RUN}]')}\n",
    "item of a list": f"peft:\n- {json.dumps(RUN)}\n",
    "config": "model: Config[os.system]\n",
    "ternary": "seed: \"__import__('os').system('touch ran') if True else 1\"\n",
    "lambda": "seed: 'lambda: 1'\n",
    "key": f"{json.dumps('seed=' + RUN + '#')}: 1\n",
    "environment": "data:\n  train: ${oc.env:HF_TOKEN}\n",
    "another file": "data: '@other.yaml'\n",
    "python tag": "!!python/object/apply:os.system ['touch ran']\n",
    "aliases": "a: &a [1]\nb: [*a, *a]\n",
    "doubled key": "seed: 1\nseed: 2\n",
    "deep": "a: " + "[" * 100_000 + "\n",
    "many values": "a: [" + "0, " * 1001 + "0]\n",
    "no mapping": "- 1\n",
    "no YAML": "a: [1\nb: }\n",
    "nothing": "",
}


@pytest.mark.fault(
    "a recipe file from a stranger runs code (_target_, dotted values, lambdas)",
    "a file may name the parts of a recipe only; everything else is refused before NeMo Run reads it",
)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_sentence_and_runs_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    path = put(tmp_path, HOSTILE[case])
    for options in ({"yaml": str(path)}, {"yaml": str(path), "factory": "smollm2_135m"}, {"factory": f"@{path}"}):
        with pytest.raises(SystemExit) as exit_:
            parse(**options)
        out, err = capsys.readouterr()
        assert exit_.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert "secret" not in out + err and len(err) < 900
    with pytest.raises(SystemExit):
        parse(f"data=@{path}", factory="smollm2_135m")
    assert not (tmp_path / "ran").exists()


def test_a_trusted_file_may_name_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST, "1")
    path = put(tmp_path, "data:\n  train: os.getcwd\n")
    assert parse(factory="smollm2_135m", yaml=str(path)).data.train == os.getcwd()


def test_what_names_code() -> None:
    for text in (
        "test.jsonl",
        "a/b.jsonl",
        "runs/os.path",
        "1e-3",
        "Review: {input}",
        "lora",
        "lora(dim=4",
        "[lora(dim=4), ptuning]",
        "json x",
        "",
    ):
        assert not names_code(text), text
    for text in (
        "os.getcwd",
        "os.getcwd()",
        "a.b(c d)",
        "[os.x]",
        "x if y else z",
        "lambda: 1",
        "[x for x in y]",
        "__main__.x",
    ):
        assert names_code(text), text
    assert all(name.startswith(("graftwork.", "lightning.pytorch.")) for name in targets())


def outcome(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Parse a damaged recipe: "refused" in one line with exit code 2, "equal", or "other" values of the same fields."""
    try:
        task = parse(factory="smollm2_135m", yaml=str(path))
    except SystemExit as stop:
        err = capsys.readouterr().err
        assert stop.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 900, err
        return "refused"
    assert task.__fn_or_cls__ is finetune
    return "equal" if task == smollm2_135m.finetune_recipe() else "other"


def fuzz(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Counter[str]:
    small = {"trainer": {"max_steps": 200}, "data": {"seq_length": 512}}
    text, counted = json.dumps(small), Counter[str]()
    for mutation in draw(count, ("json", "bytes")):
        damaged = mutate_json(text, mutation) if mutation.family == "json" else mutate(text.encode(), mutation)
        counted[outcome(put(tmp_path, damaged), capsys)] += 1
    with capsys.disabled():
        print(f"recipe files: {count} tried, {dict(counted)}")
    return counted


def test_three_hundred_mutations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted = fuzz(300, tmp_path, capsys)
    assert counted["refused"] > 100 and counted["equal"]


@pytest.mark.slow
def test_five_thousand_mutations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted = fuzz(5000, tmp_path, capsys)
    assert counted["refused"] > 1500 and counted["equal"]
