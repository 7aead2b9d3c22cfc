"""A recipe on disk is the recipe: what was set comes back, and a file runs nothing."""

from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from graftwork.errors import ArtifactError, ConfigError
from graftwork.peft import IA3, LoRA, PTuning
from graftwork.recipes import RECIPES, show
from graftwork.recipes.allowed import TRUST
from graftwork.recipes.files import from_adapter, from_text, load, save
from graftwork.training import MegatronStrategy
from graftwork.training.callbacks import TrainingState

ODD = {
    "data.prompt_template": 'a "quoted": {input}\n# no comment — é',
    "data.train": "lora",  # the name of a factory
    "optim.lr": 1e-05,
    "trainer.limit_val_batches": float("inf"),
    "trainer.default_root_dir": "runs/with space",
    "trainer.plugins": (0.9, 0.95),
    "seed": True,
}


def odd_recipe() -> Any:
    recipe: Any = RECIPES["smollm2_135m"].finetune_recipe(
        peft=[run.Config(LoRA, dim=4, layers=[0, 1], rank_pattern={"linear_*": 2}), IA3(), run.Config(PTuning)]
    )
    for path, value in ODD.items():
        *parts, last = path.split(".")
        owner = recipe
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    recipe.trainer.callbacks = [run.Config(TrainingState, every_n_steps=5)]
    return recipe


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_comes_back_equal(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name].finetune_recipe()
    back = load(save(recipe, tmp_path / "recipe.yaml"))
    assert back == recipe and isinstance(back, run.Partial)
    assert show(back) == show(recipe) == show(from_text(show(recipe)))


def test_odd_values_come_back_equal(tmp_path: Path) -> None:
    recipe = odd_recipe()
    back = load(save(recipe, tmp_path / "recipe.yaml"))
    assert back == recipe
    for path, value in ODD.items():
        owner: Any = back
        for part in path.split("."):
            owner = getattr(owner, part)
        assert owner == value and type(owner) is type(value)
    assert [type(one) for one in back.peft] == [run.Config] * 3


def test_a_shared_part_stays_shared(tmp_path: Path) -> None:
    recipe = odd_recipe()
    recipe.trainer.callbacks.append(recipe.trainer.callbacks[0])
    back = load(save(recipe, tmp_path / "recipe.yaml"))
    assert back.trainer.callbacks[0] is back.trainer.callbacks[1]


def test_a_value_that_is_no_data_is_refused_by_its_field(tmp_path: Path) -> None:
    recipe = odd_recipe()
    recipe.trainer.default_root_dir = Path("runs")
    with pytest.raises(ConfigError, match=r"^trainer\.default_root_dir=.* is no plain value"):
        save(recipe, tmp_path / "recipe.yaml")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"name it 'recipe.yaml'"):
        save(recipe, tmp_path / "recipe.txt")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("_target_: os.system\ncommand: touch {mark}\n", "'os.system' is no part of a recipe"),
        ("_target_: graftwork.training.finetune.finetune\nmodl: 3\n", "no field 'modl'; did you mean 'model'"),
        (
            "_target_: graftwork.training.finetune.finetune\nmodel: {_target_: subprocess.run, args: [touch, x]}\n",
            "model: 'subprocess.run' is no part",
        ),
        ("_target_: graftwork.training.finetune.finetune\nmodel: {_same_as_: trainer}\n", "no part that stands above"),
        (
            "_target_: graftwork.training.finetune.finetune\nseed: !!python/object/apply:os.getcwd []\n",
            "cannot be read",
        ),
        ("model: 3\n", "names no _target_"),
        ("- 1\n", "a mapping of fields is valid"),
    ],
)
def test_a_file_of_a_stranger_runs_nothing(text: str, sentence: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace("{mark}", str(mark)))
    with pytest.raises(ConfigError, match=sentence):
        load(file)
    assert not mark.exists()


def test_trust_lets_a_file_name_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("_target_: graftwork.training.finetune.finetune\nmodel: {_target_: pathlib.PurePath}\n")
    with pytest.raises(ConfigError, match=TRUST):
        load(file)
    monkeypatch.setenv(TRUST, "1")
    assert load(file).model == run.Config(__import__("pathlib").PurePath)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("nonsense", "is no line of a recipe"),
        ("seed = <function f at 0x7f>", "seed: .* is no plain value"),
        ("peft[3].dim = 4", "stands at no place"),
        ("peft[0] = os.system", "is no part of a recipe"),
    ],
)
def test_a_broken_line_of_a_text_is_named(line: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        from_text(f"recipe = graftwork.training.finetune.finetune\n{line}")


def test_an_adapter_without_a_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"recipe": null}')
    with pytest.raises(ArtifactError, match="tells no recipe"):
        from_adapter(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        from_adapter(tmp_path / "absent")


def test_a_layout_s_strategy_is_part_of_the_file(tmp_path: Path) -> None:
    recipe = RECIPES["llama2_70b"].finetune_recipe()
    back = load(save(recipe, tmp_path / "recipe.yaml"))
    assert back.trainer.strategy.__fn_or_cls__ is MegatronStrategy
    assert back.trainer.strategy.tensor_model_parallel_size == recipe.trainer.strategy.tensor_model_parallel_size
