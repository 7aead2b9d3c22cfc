"""A grid is a product of fields' values: what each recipe changes, where it goes, and what is refused."""

from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest

from graftwork.errors import ConfigError
from graftwork.peft import DoRA, LoRA, PTuning
from graftwork.recipes import diff, smollm2_135m
from graftwork.recipes.grid import LONGEST_NAME, grid, run_name
from graftwork.recipes.show import lines

DIRECTORY = "trainer.default_root_dir"


def recipe(**options: Any) -> run.Partial:
    return smollm2_135m.finetune_recipe(**options)


def names(made: list[run.Partial]) -> list[str]:
    return [Path(one.trainer.default_root_dir).name for one in made]


def test_it_is_the_product_and_changes_nothing_else() -> None:
    base = recipe(dir="out", name="sweep")
    before = lines(base)
    made = grid(base, {"peft[0].dim": [8, 16], "optim.lr": [1e-4, 1e-3, 1e-2]})
    assert [(one.peft[0].dim, one.optim.lr) for one in made] == [(d, lr) for d in (8, 16) for lr in (1e-4, 1e-3, 1e-2)]
    for one in made:
        told = {path for path, value in lines(one).items() if before.get(path) != value}
        assert told == {"peft[0].dim", "optim.lr", DIRECTORY}
        assert Path(one.trainer.default_root_dir).parent == Path("out/sweep")
    assert lines(base) == before, "the recipe itself stays as it was"
    assert names(made)[:2] == ["dim-8_lr-0.0001", "dim-8_lr-0.001"]


def test_every_path_that_show_prints_can_be_an_axis() -> None:
    base = recipe()
    for path, value in lines(base).items():
        if path in ("recipe", DIRECTORY) or value.startswith(("graftwork.", "lightning.")):
            continue
        (made,) = grid(base, {path: ["something else"]})
        assert lines(made)[path] == repr("something else"), path


def test_whole_parts_can_be_an_axis() -> None:
    stacks = [None, [run.Config(LoRA, dim=4)], [run.Config(LoRA, dim=8)], [run.Config(DoRA), run.Config(PTuning)]]
    made = grid(recipe(), {"peft": stacks})
    assert [one.peft for one in made] == stacks
    assert names(made) == ["peft-None", "peft-lora.dim-4", "peft-lora.dim-8", "peft-dora+ptuning"]
    made[1].peft[0].dim = 99
    assert stacks[1][0].dim == 4, "no part is shared"
    later = grid(recipe(), {"peft": [[run.Config(LoRA)], [run.Config(DoRA)]], "peft[0].dim": [2, 3]})
    assert [(one.peft[0].__fn_or_cls__, one.peft[0].dim) for one in later] == [
        (LoRA, 2), (LoRA, 3), (DoRA, 2), (DoRA, 3),
    ]  # fmt: skip


def test_third_party_fields_that_are_not_set_can_be_an_axis() -> None:
    made = grid(recipe(), {"trainer.gradient_clip_algorithm": ["norm", "value"]})
    assert [one.trainer.gradient_clip_algorithm for one in made] == ["norm", "value"]


def test_names_tell_axes_apart_and_are_safe() -> None:
    assert run_name({"peft[0].dim": 8, "peft[1].dim": 4, "optim.lr": 1e-5}) == "peft0.dim-8_peft1.dim-4_lr-1e-05"
    assert run_name({"peft.0.dim": 8, "peft[1].dim": 4}) == "peft0.dim-8_peft1.dim-4"
    assert run_name({"data.train": "my data/a b.jsonl", "peft": None}) == "train-my-data-a-b.jsonl_peft-None"
    assert (
        run_name({"peft[0].target_modules": ["linear_qkv", "linear_proj"]}) == "target_modules-linear_qkv+linear_proj"
    )
    assert run_name({"data.prompt_template": ""}) == "prompt_template-empty"
    long = [run_name({"data.prompt_template": "x" * 400 + end}) for end in "ab"]
    assert len(set(long)) == 2 and all(len(name) == LONGEST_NAME for name in long)


REFUSED = {
    "misspelt": ({"peft[0].dmi": [1]}, "peft[0] has no field 'dmi'; did you mean 'dim'"),
    "elsewhere": ({"dim": [1]}, "Fields of that name: peft[0].dim"),
    "no part": ({"optm.lr": [1]}, "the recipe has no field 'optm'; did you mean 'optim'"),
    "index": ({"peft[2].dim": [1]}, "peft holds 1 item(s); use peft[0] to peft[0]"),
    "below a value": ({"data.seq_length.x": [1]}, "data.seq_length is 512 and has no field 'x'"),
    "no path": ({"optim..lr": [1]}, "'optim..lr' is no path of a field; did you mean 'optim.lr'"),
    "no list": ({"optim.lr": 1e-3}, "optim.lr is 0.001; a list of values is valid"),
    "a string": ({"model.dtype": "fp32"}, "model.dtype is 'fp32'; a list of values is valid"),
    "empty": ({"optim.lr": []}, "a list of values is valid"),
    "nothing": ({}, "a grid needs a field to change"),
    "twice": ({"optim.lr": [1e-3, 0.001]}, "two runs of the grid would be called 'lr-0.001'"),
    "one axis twice": (
        {"peft[0].dim": [1], "peft.0.dim": [2]},
        "peft[0].dim cannot be an axis of the grid: it is g",
    ),
    "the directory": ({DIRECTORY: ["a"]}, "it sets it itself"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_one_sentence(kind: str) -> None:
    axes, said = REFUSED[kind]
    with pytest.raises(ConfigError) as raised:
        grid(recipe(), axes)  # type: ignore[arg-type]
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_recipe_without_a_directory_is_refused() -> None:
    without = recipe()
    del without.trainer.default_root_dir
    with pytest.raises(ConfigError, match=r"has no trainer\.default_root_dir"):
        grid(without, {"optim.lr": [1e-3]})


def test_the_recipes_build_and_differ_as_told() -> None:
    small, large = grid(recipe(), {"peft[0].dim": [8, 16]})
    assert [fdl.build(one).keywords["peft"][0].dim for one in (small, large)] == [8, 16]
    assert diff(small, large).splitlines()[-2:] == ["- peft[0].dim = 8", "+ peft[0].dim = 16"]
