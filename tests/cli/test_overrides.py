"""The override grammar: every form of the documentation, and the sentence for every way to get it wrong."""

from typing import Any

import catalogue
import fiddle as fdl
import nemo_run as run
import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from graftwork.cli.context import GraftContext
from graftwork.cli.factories import register
from graftwork.executors import EXECUTORS, local
from graftwork.peft import METHODS, CanonicalAdapter, CanonicalLoRA, DoRA, LoRA, PTuning
from graftwork.recipes import RECIPES, show, smollm2_135m
from graftwork.training import finetune


class Parsed(GraftContext):
    """Keeps the task instead of running it."""

    def execute(self, task: run.Partial) -> None:
        self.__dict__["task"] = task


def parse(*args: str, factory: str | None = "smollm2_135m") -> Any:
    context = Parsed(name="finetune", factory=factory, skip_confirmation=True)
    context.cli_execute(finetune, list(args))
    return context.task


def refuse(capsys: pytest.CaptureFixture[str], *args: str, factory: str | None = "smollm2_135m") -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(*args, factory=factory)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in out + err
    return err


def test_no_override_is_the_recipe() -> None:
    assert parse() == smollm2_135m.finetune_recipe()


def test_a_stack_of_methods() -> None:
    task = parse("peft=[lora(dim=16),ptuning]")
    assert task.peft == [run.Config(LoRA, dim=16), run.Config(PTuning)]


@pytest.mark.parametrize("value", ["lora", "lora(dim=16,alpha=8)", "canonical_adapter(dim=4)"])
def test_a_bare_method_becomes_a_list(value: str) -> None:
    assert isinstance(parse(f"peft={value}").peft, list) and len(parse(f"peft={value}").peft) == 1


def test_a_field_of_a_method_by_index() -> None:
    assert parse("peft[0].layers=[0,1]").peft == [run.Config(LoRA, layers=[0, 1])]
    assert parse("peft[0].target_modules=['linear_qkv']").peft[0].target_modules == ["linear_qkv"]
    assert parse("peft[0].rank_pattern={'*.linear_fc1': 4}").peft[0].rank_pattern == {"*.linear_fc1": 4}


def test_layers_of_the_whole_model_or_of_its_parts() -> None:
    assert parse("peft[0].layers={'encoder':[0,1],'decoder':[2]}").peft[0].layers == {"encoder": [0, 1], "decoder": [2]}
    task = parse("peft=[dora(layers={'decoder':[1]}),canonical_lora(target_modules=['linear_q'],layers=[0])]")
    assert task.peft == [
        run.Config(DoRA, layers={"decoder": [1]}),
        run.Config(CanonicalLoRA, target_modules=["linear_q"], layers=[0]),
    ]
    assert "peft[0].layers = {'decoder': [1]}" in show(task)
    serializer = ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(task)) == task
    assert [t.layers for t in fdl.build(task).keywords["peft"]] == [{"decoder": [1]}, [0]]


@pytest.mark.parametrize("value", ["3", "{'decoder':3}", "all"])
def test_layers_that_are_none_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a value of type Union[list[int], dict[str, list[int]]" in refuse(capsys, f"peft[0].layers={value}")


def test_a_stack_and_then_its_field() -> None:
    task = parse("peft=[canonical_adapter,lora]", "peft[1].dim=4")
    assert task.peft == [run.Config(CanonicalAdapter), run.Config(LoRA, dim=4)]
    assert parse("peft=lora", "peft[0].dim=4").peft == [run.Config(LoRA, dim=4)]


def test_adding_to_the_stack() -> None:
    assert parse("peft+=[ptuning]").peft == [run.Config(LoRA), run.Config(PTuning)]


@pytest.mark.parametrize("nothing", ["None", "null", "[]"])
def test_no_stack_is_full_fine_tuning(nothing: str) -> None:
    assert not parse(f"peft={nothing}").peft


def test_plain_fields() -> None:
    task = parse("trainer.max_steps=60", "optim.lr=1e-3", "data.packing=true", "resume=False", "data.train=a/b.jsonl")
    assert (task.trainer.max_steps, task.optim.lr, task.data.packing, task.resume) == (60, 1e-3, True, False)
    assert task.data.train == "a/b.jsonl"
    assert parse("trainer.max_steps*=2").trainer.max_steps == 400
    assert parse("model.dtype=None").model.dtype is None


def test_text_with_braces_and_spaces() -> None:
    assert parse("data.prompt_template=Review: {input} Sentiment:").data.prompt_template == "Review: {input} Sentiment:"


def test_a_field_of_the_shape_and_of_the_strategy() -> None:
    task = parse("model.shape.num_layers=2", "trainer.strategy.tensor_model_parallel_size=3")
    assert fdl.build(task.model.shape).num_layers == 2
    assert task.trainer.strategy.tensor_model_parallel_size == 3


def test_factory_arguments() -> None:
    task = parse(factory="llama2_7b(num_nodes=2, name=long)")
    assert (task.trainer.num_nodes, task.trainer.default_root_dir) == (2, "runs/long")


def test_every_method_can_be_named() -> None:
    for method in METHODS.values():
        assert parse(f"peft=[{method.short_name()}]").peft == [run.Config(method)]


def test_a_new_recipe_method_or_executor_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fifth(LoRA):
        def __init__(self, name: str = "fifth", dim: int = 5) -> None:
            super().__init__(name, dim=dim)

    def three(tasks: int = 3) -> run.LocalExecutor:
        return local(tasks)

    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))
    monkeypatch.setattr(RECIPES, "_entries", {"mine": smollm2_135m})
    monkeypatch.setattr("graftwork.cli.factories.METHODS", {"Fifth": Fifth})
    monkeypatch.setattr(EXECUTORS, "_entries", {"three": three})
    register()
    context = Parsed(name="finetune", factory="mine(name=x)", skip_confirmation=True)
    context.cli_execute(finetune, ["peft=fifth(dim=4)", "run.executor=three", "run.executor.tasks=2"])
    assert context.task == smollm2_135m.finetune_recipe(name="x", peft=[run.Config(Fifth, dim=4)])
    assert (context.executor.nproc_per_node(), context.executor.launcher) == (2, local(3).launcher)


WRONG = {
    "unknown field": (["trainer.max_stepz=60"], "trainer has no field 'max_stepz'; did you mean 'max_steps'"),
    "unknown top field": (["trainr.max_steps=60"], "the recipe has no field 'trainr'; did you mean 'trainer'?"),
    "unknown method": (
        ["peft=[lora,ptunig]"],
        "no peft is called 'ptunig'; did you mean 'ptuning' or 'prompt_tuning'?",
    ),
    "unknown bare method": (["peft=lorra"], "no peft is called 'lorra'; did you mean 'lora' or 'dora'?"),
    "unknown argument": (["peft=[lora(dmi=4)]"], "lora has no argument 'dmi'; did you mean 'dim'"),
    "wrong type": (["trainer.max_steps=many"], "trainer.max_steps=many is not valid: a value of type int is expected."),
    "wrong index": (["peft[1].dim=4"], "peft holds 1 item(s)"),
    "field of nothing": (["peft=None", "peft[0].dim=4"], "peft is None and has no field '0'"),
    "no value": (["trainer.max_steps"], "'trainer.max_steps' is no override"),
    "unknown executor": (["run.executor=locl"], "no executor is called 'locl'; did you mean 'local'?"),
    "unknown run option": (["run.exector.ntasks=2"], "exector"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_override_is_one_line_that_names_what_is_valid(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, message = WRONG[case]
    assert message in refuse(capsys, *args)


def test_a_wrong_recipe_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no recipe is called 'lama2_7b'; did you mean 'llama2_7b'" in refuse(capsys, factory="lama2_7b")
    assert "llama2_7b has no argument 'nodes'; did you mean 'num_nodes'" in refuse(capsys, factory="llama2_7b(nodes=2)")
