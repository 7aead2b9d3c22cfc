"""``nemorun graft plan``: what it prints, what it writes, and its exit code."""

import json
from pathlib import Path
from typing import Any

import pytest

import graftwork.cli  # noqa: F401  registers recipes and methods
from graftwork.cli.plan import PlanContext, plan
from tests.helpers.tiny_recipe import make_place, overrides


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("plan"))


def typed(place: Path, *more: str) -> list[str]:
    return [*overrides(place, 4), "peft=[lora(dim=4)]", "data.micro_batch_size=2", *more]


def execute(args: list[str], **options: Any) -> None:
    PlanContext(name="plan", factory="smollm2_135m", **options).cli_execute(plan, args)


def test_it_prints_the_plan_and_keeps_it_as_json(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "plan.json"
    execute(typed(place, "device=H100", f"output={kept}"))
    out = capsys.readouterr().out
    # q, k, v, out, gate, up and down of 4 layers: r (in + out) of each fused linear
    trained = 4 * 4 * ((48 + 48 + 2 * 24) + (48 + 48) + (48 + 2 * 80) + (80 + 48))
    assert f"trains {trained:,} of " in out and "\nH100 " in out and "A100" not in out
    assert f"base {place / 'base'}" in out and out.rstrip().endswith("no problems found")
    assert json.loads(kept.read_text())["problems"] == []


def test_a_fit_ends_with_overrides_that_plan_without_problems(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute([*typed(place), "--fit", "2xH100"])
    advised = capsys.readouterr().out.rstrip().splitlines()[-1].split()
    assert "trainer.devices=2" in advised
    execute(typed(place, *advised))
    assert "\n2 device(s)" in capsys.readouterr().out


PROBLEMS = {
    "the rows and the layout": (
        ["data.seq_length=512", "trainer.devices=3", "trainer.strategy.tensor_model_parallel_size=3"],
        ["trainer.strategy.tensor_model_parallel_size", "data.seq_length"],
    ),
    "the batch": (["data.global_batch_size=3"], ["data.global_batch_size"]),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_told_with_their_fields_and_end_with_2(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, fields = PROBLEMS[case]
    with pytest.raises(SystemExit) as ended:
        execute(typed(place, *wrong))
    out = capsys.readouterr().out
    assert ended.value.code == 2
    told = [line.removeprefix("- ").split(": ")[0] for line in out.splitlines() if line.startswith("- ")]
    assert told == fields, out


def test_a_mistake_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        execute(typed(place, "device=H1000"))
    assert ended.value.code == 2
    assert "H100" in capsys.readouterr().err
