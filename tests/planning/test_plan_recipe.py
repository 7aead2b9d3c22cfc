"""Recipes planned: problems name the field to change, layouts that fit are right and can be applied."""

import pytest

from graftwork import recipes
from graftwork.errors import ConfigError
from graftwork.layout import Layout
from graftwork.models import GPT
from graftwork.peft import LoRA
from graftwork.planning.advice import advise, as_text, parse_fit
from graftwork.planning.blueprint import Blueprint
from graftwork.planning.checks import Intent, layout_problems, row_problems
from graftwork.planning.devices import DEVICES, Device, device_named
from graftwork.planning.judge import ROOM
from graftwork.planning.plan import make_plan
from graftwork.planning.workload import Workload
from graftwork.recipes.planning import refuse_problems
from tests.contracts.methods import shape

ROWS = Workload(seq_length=16, micro_batch_size=1, global_batch_size=4)


def intent(layout: Layout | None = None, world: int = 1, rows: Workload = ROWS, **sizes: int) -> Intent:
    return Intent(Blueprint(GPT, shape(**sizes), "bf16", None, [LoRA(dim=4)]), layout or Layout(), world, rows)


@pytest.mark.parametrize(
    ("layout", "world", "rows", "field"),
    [
        (Layout(2), 3, ROWS, "trainer.devices"),
        (Layout(1, 3), 3, ROWS, "trainer.strategy.pipeline_model_parallel_size"),
        (Layout(4), 4, ROWS, "trainer.strategy.tensor_model_parallel_size"),
        (Layout(), 3, ROWS, "data.global_batch_size"),
        (Layout(1, 1, None, 2), 2, Workload(18, 1, 4, packing=True), "data.seq_length"),
        (Layout(), 1, Workload(16, 3, 4), "data.global_batch_size"),
    ],
)
def test_sizes_that_do_not_fit_name_their_field(layout: Layout, world: int, rows: Workload, field: str) -> None:
    assert [problem.field for problem in layout_problems(intent(layout, world, rows))] == [field]


def test_rows_that_do_not_fit_are_told_with_their_field() -> None:
    odd = Workload(15, 1, 4)
    assert [problem.field for problem in row_problems(intent(Layout(2, sequence_parallel=True), 2, odd))] == [
        "data.seq_length"
    ]


def test_every_transform_that_does_not_fit_is_told_and_the_others_are_planned() -> None:
    stack = [LoRA(target_modules=["linear_qk"]), LoRA(name="other", dim=4), LoRA(name="third", layers=[7])]
    made = make_plan(Intent(Blueprint(GPT, shape(), "fp32", None, stack), Layout(), 1, ROWS), ())
    assert [problem.field for problem in made.problems] == ["peft[0]", "peft[2]"]
    assert {site.adapter for site in made.sites} == {"other"}
    assert "linear_qkv" in made.problems[0].message and "0 to 1" in made.problems[1].message


def test_a_run_that_fits_nowhere_is_a_problem() -> None:
    tiny = Device("tiny", 1e5, {"bf16": 1e12, "fp32": 1e12}, 1e12, 1e11, 1e10, 0.0)
    (problem,) = make_plan(intent(), [tiny]).problems
    assert problem.field == "trainer.strategy" and "100 kB" in problem.message


def test_recipes_are_refused_with_all_their_problems() -> None:
    recipe = recipes.smollm2_135m.finetune_recipe()
    recipe.trainer.strategy.pipeline_model_parallel_size = 7
    with pytest.raises(ConfigError, match=r"problem\(s\): .*pipeline_model_parallel_size.*data\.train"):
        refuse_problems(recipe)


def test_advice_fits_and_is_ranked() -> None:
    one = intent(num_layers=4)
    roomy = Device("roomy", 1e12, {"bf16": 1e12, "fp32": 1e12}, 1e12, 1e11, 1e10, 0.0)
    found = advise(one, 4, roomy)
    seconds = [candidate.on.speed.seconds for candidate in found]
    assert seconds == sorted(seconds) and len(found) > 10
    assert all(not layout_problems(candidate.intent) for candidate in found)
    best = found[0]
    again = make_plan(best.intent, [roomy])
    assert not again.problems and again.devices[0].peak == pytest.approx(best.on.peak, rel=0.05)
    assert again.devices[0].speed.seconds == pytest.approx(best.on.speed.seconds, rel=0.05)
    assert " ".join(best.overrides()) in as_text(found, 4, roomy)
    middle = sorted(candidate.on.peak for candidate in found)[len(found) // 2]
    tight = Device("tight", middle / ROOM, roomy.flops, roomy.bandwidth, roomy.link, roomy.network, 0.0)
    fewer = advise(one, 4, tight)
    assert 0 < len(fewer) < len(found) and all(c.on.peak <= middle for c in fewer)


def test_devices_are_named() -> None:
    assert parse_fit("8xh100") == (8, DEVICES["H100"])
    for wrong in ("H100", "8x", "0xH100", "x", "8xH10"):
        with pytest.raises(ConfigError, match="8xH100|H100"):
            parse_fit(wrong)
    cpu = device_named("cpu")
    assert cpu.flops["fp32"] > 1e8 and cpu.memory > 1e9
