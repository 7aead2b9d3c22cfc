"""Every recipe: its text is reviewed, it builds without weights, travels through the serializer, and fits itself."""

import inspect
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import torch
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from graftwork.errors import ConfigError
from graftwork.layout import Layout
from graftwork.models import MODELS
from graftwork.peft import LoRA, PTuning
from graftwork.recipes import RECIPES, diff, show
from graftwork.recipes.show import lines, with_changes, with_text
from tests.helpers.golden import DIRECTORY, golden, text

NAMES = list(RECIPES)
PLAIN = (int, float, bool, str, type(None))


def recipe(base: str, **options: Any) -> run.Partial:
    return RECIPES[base].finetune_recipe(**options)


def layout(config: run.Partial) -> Layout:
    given = config.trainer.strategy.__arguments__
    return Layout(**given)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, fdl.Buildable):
        return [leaf for child in value.__arguments__.values() for leaf in leaves(child)]
    if isinstance(value, list | tuple | dict):
        children = value.values() if isinstance(value, dict) else value
        return [leaf for child in children for leaf in leaves(child)]
    return [value]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_reviewed_one(name: str) -> None:
    assert text(name) == golden(name).read_text(), "an intended change? run `make golden` and review the diff"


def test_there_is_no_text_without_a_recipe() -> None:
    assert sorted(p.stem for p in DIRECTORY.glob("*.txt")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_without_weights(name: str) -> None:
    before = torch.get_rng_state()
    built = fdl.build(recipe(name))
    model, trainer, data = (built.keywords[k] for k in ("model", "trainer", "data"))
    assert type(model) in MODELS.values() and model.module is None and not list(model.parameters())
    assert trainer.max_steps == recipe(name).trainer.max_steps
    assert data.seq_length <= model.shape.max_position_embeddings
    assert [type(p) for p in built.keywords["peft"]] == [LoRA]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_its_own_devices_shape_and_batch(name: str) -> None:
    config = recipe(name)
    world, shape = config.trainer.devices * config.trainer.num_nodes, fdl.build(config.model.shape)
    layout(config).check_shape(shape)
    layout(config).check_batch(config.data.global_batch_size, config.data.micro_batch_size, world)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_leave_a_third_of_an_80_gb_gpu_free(name: str) -> None:
    config = recipe(name)
    sizes, shape = layout(config), fdl.build(config.model.shape)
    gated = 3 * shape.hidden_size * shape.expert_width  # of one expert; they are whole on every tensor-parallel rank
    experts = (shape.num_moe_experts or 0) * shape.num_layers * gated
    a_stage = (shape.total_parameters() - experts) / sizes.tensor_model_parallel_size
    a_stage += experts / sizes.expert_model_parallel_size
    assert 2 * a_stage / sizes.pipeline_model_parallel_size < 80e9 * 2 / 3


@pytest.mark.parametrize("name", NAMES)
def test_it_survives_nemo_run_s_serializer(name: str) -> None:
    serializer, config = ZlibJSONSerializer(), recipe(name, peft=[run.Config(LoRA, dim=4), run.Config(PTuning)])
    again = serializer.deserialize(serializer.serialize(config))
    assert again == config and show(again) == show(config)


@pytest.mark.parametrize("name", NAMES)
def test_its_leaves_are_plain_data(name: str) -> None:
    assert all(isinstance(leaf, PLAIN) for leaf in leaves(recipe(name)))


@pytest.mark.parametrize("name", NAMES)
def test_full_fine_tuning_differs_by_one_field(name: str) -> None:
    peft, full = recipe(name), recipe(name, peft=None)
    different = [k for k in peft.__arguments__ if peft.__arguments__[k] != full.__arguments__[k]]
    assert different == ["peft"] and full.peft is None and recipe(name, peft=[]) == full
    assert {line.split()[1].split("[")[0].split(".")[0] for line in diff(peft, full).splitlines()} == {"peft"}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_offers_the_same_three_functions(name: str) -> None:
    module = RECIPES[name]
    assert list(inspect.signature(module.finetune_recipe).parameters) == [
        "dir", "name", "num_nodes", "num_gpus_per_node", "peft"
    ]  # fmt: skip
    config = recipe(name)
    assert (module.model(), module.trainer()) == (config.model, config.trainer)
    assert inspect.signature(module.finetune_recipe).return_annotation is run.Partial
    assert module.finetune_recipe.__doc__ and len(module.finetune_recipe.__doc__.splitlines()) > 2


def test_arguments_reach_the_trainer() -> None:
    trainer = recipe("llama2_7b", dir="out", name="x", num_nodes=2, num_gpus_per_node=4).trainer
    assert (trainer.default_root_dir, trainer.num_nodes, trainer.devices) == ("out/x", 2, 4)


def test_two_recipes_share_nothing() -> None:
    one, two = recipe("gpt2_124m"), recipe("gpt2_124m")
    one.peft[0].dim = 1
    one.model.shape.num_layers = 1
    assert two == recipe("gpt2_124m") != one


def test_a_stack_may_be_bare_a_list_or_built() -> None:
    wanted = recipe("gpt2_124m", peft=[run.Config(LoRA, dim=4)])
    assert recipe("gpt2_124m", peft=run.Config(LoRA, dim=4)) == wanted
    assert show(recipe("gpt2_124m", peft=LoRA(dim=4))) == show(wanted)


@pytest.mark.parametrize("wrong", ["lora", LoRA, run.Config(dict), [3]])
def test_what_is_no_transform_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="is no PEFT transform; give run.Config"):
        recipe("gpt2_124m", peft=wrong)


@pytest.mark.parametrize("path", ["trainer", "model", "data", "optim", "model.shape", "trainer.strategy"])
def test_an_unknown_field_raises_and_names_the_valid_ones(path: str) -> None:
    config: Any = recipe("smollm2_135m")
    for part in path.split("."):
        config = getattr(config, part)
    valid = next(iter(inspect.signature(config.__fn_or_cls__).parameters))
    with pytest.raises(AttributeError, match=f"No parameter named 'no_such_field'.*valid parameter names: .*{valid}"):
        config.no_such_field = 1


def test_show_names_callables_and_defaults_and_diff_only_changes() -> None:
    before, after = recipe("smollm2_135m"), recipe("smollm2_135m")
    after.trainer.max_steps, after.peft[0].dim = 60, 8
    after.optim.beta2 = 0.999  # the default, said explicitly
    assert lines(before)["recipe"] == "graftwork.training.finetune.finetune"
    assert lines(before)["peft[0]"] == "graftwork.peft.lora.LoRA" and lines(before)["peft[0].alpha"] == "32"
    assert diff(before, after).splitlines() == [
        "- trainer.max_steps = 200",
        "+ trainer.max_steps = 60",
        "- peft[0].dim = 32",
        "+ peft[0].dim = 8",
    ]
    assert diff(before, recipe("smollm2_135m")) == ""


def test_a_launched_recipe_carries_its_own_text_once() -> None:
    config = recipe("smollm2_135m")
    carrying = with_text(config)
    assert carrying.recipe_text == show(config) == show(carrying) and diff(config, carrying) == ""
    assert config == recipe("smollm2_135m") and with_text(carrying) is carrying
    assert with_text(run.Partial(text, name="x")) == run.Partial(text, name="x")


def test_what_was_set_beside_a_recipe_travels_with_it_and_is_no_part_of_it() -> None:
    config = recipe("smollm2_135m")
    carrying = with_changes(config, "+ a = 1")
    assert carrying.recipe_changes == "+ a = 1" and show(carrying) == show(config)
    assert with_changes(carrying, "+ b = 2") is carrying
    assert with_changes(run.Partial(text, name="x"), "") == run.Partial(text, name="x")
