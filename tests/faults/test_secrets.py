"""No secret of the environment is written anywhere: run directory, artifact, recipe text, what an executor writes."""

import os
from collections.abc import Iterator
from pathlib import Path

import nemo_run as run
import pytest

from graftwork.executors import launch, local
from graftwork.peft import LoRA
from graftwork.recipes import RECIPES, show
from tests.helpers import tiny_run
from tests.helpers.tasks import write_ranks
from tests.helpers.tiny_run import finetune

SECRET = "hf_planted0secret0token"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    yield


def leaks(*roots: Path) -> list[str]:
    files = [file for root in roots for file in root.rglob("*") if file.is_file()]
    assert files
    return [str(file) for file in files if SECRET.encode() in file.read_bytes() or SECRET in file.name]


@pytest.mark.fault(
    "tokens of the environment are written into logs, artifacts and job scripts",
    "no part of the environment is written; a planted token is searched for in every file",
)
def test_a_run_and_its_artifact_hold_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tiny_run.data_module(tiny_run.write_data(tmp_path / "data"))
    trainer = tiny_run.trainer(tmp_path / "run", max_steps=4)
    finetune(tiny_run.model(), trainer, data, [LoRA(dim=4)], tiny_run.optim(), recipe_text="recipe")
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert leaks(tmp_path) == [] and SECRET not in "".join(capfd.readouterr())


def test_recipe_texts_hold_no_secret() -> None:
    assert not any(SECRET in show(recipe.finetune_recipe()) for recipe in RECIPES.values())


@pytest.mark.processes
def test_what_an_executor_writes_holds_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert SECRET not in str(local(ntasks=2))
    launch(run.Partial(write_ranks, directory=str(tmp_path)), name="secret")
    assert leaks(Path(os.environ["NEMORUN_HOME"]), tmp_path) == [] and SECRET not in "".join(capfd.readouterr())
