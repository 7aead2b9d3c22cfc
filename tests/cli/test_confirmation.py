"""What is shown before a training is asked for: what differs from the recipe, what trains, and how much it takes."""

import nemo_run as run
import pytest

from graftwork.cli import factories
from graftwork.cli.context import GraftContext
from graftwork.peft import CanonicalLoRA, DoRA, LoRA, PTuning
from graftwork.planning.show import size
from graftwork.recipes import planning, smollm2_135m
from graftwork.recipes.show import lines
from graftwork.training import finetune

CHANGES = ["peft=[lora(dim=8)]", "optim.lr=1e-3", "trainer.max_steps=60"]


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    factories.register()
    with pytest.raises(SystemExit) as ended:
        GraftContext(name="finetune", factory="smollm2_135m").cli_execute(finetune, list(args))
    told = capsys.readouterr()
    assert ended.value.code == 2 and "add --yes to run" in told.err
    return told.out


def test_what_was_changed_is_shown_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    first, *changed, last = shown(capsys, *CHANGES).splitlines()
    assert first == "changed, of the recipe (--all shows every field):"
    assert changed == [
        "- trainer.max_steps = 200", "+ trainer.max_steps = 60", "- peft[0].dim = 32", "+ peft[0].dim = 8",
        "- optim.lr = None", "+ optim.lr = 0.001",
    ]  # fmt: skip
    assert last.startswith("LoRA 'lora' (rank 8, scale 4): trains 2,027,520 of ")


def test_nothing_changed_and_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys).splitlines()[0] == "the recipe as it is."
    everything = shown(capsys, "--all").splitlines()
    assert everything[:-1] == [f"{path} = {value}" for path, value in lines(smollm2_135m.finetune_recipe()).items()]


def test_the_line_tells_what_the_plan_finds() -> None:
    recipe = smollm2_135m.finetune_recipe(peft=[run.Config(LoRA, dim=8)])
    made, line = planning.plan(recipe, ["cpu"]), planning.outlook(recipe)
    assert line is not None and f"{made.trainable_parameters:,} of {made.total_parameters:,} parameters" in line
    assert f"about {size(made.devices[0].peak)} on the fullest rank" in line and "1 x cpu" in line


def test_a_summary_tells_the_scale() -> None:
    made = LoRA(dim=8), LoRA(dim=16, alpha=16), DoRA(dim=64), CanonicalLoRA(dim=16, use_rslora=True), PTuning()
    assert [one.summary() for one in made] == [
        "LoRA 'lora' (rank 8, scale 4)",
        "LoRA 'lora' (rank 16, scale 1)",
        "DoRA 'dora' (rank 64, scale 0.5)",
        "CanonicalLoRA 'canonical_lora' (rank 16, scale 8)",
        "PTuning 'ptuning'",
    ]
