"""finetune: the run directory, the summary, best and last adapters, full fine-tuning, refusals."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from graftwork.errors import ConfigError
from graftwork.peft import LoRA
from graftwork.training import finetune
from graftwork.training.callbacks import AdapterCheckpoint, BeforeAfter, Report
from graftwork.training.checksums import checksums
from graftwork.training.finetune import equip
from graftwork.training.run import RunFacts
from tests.helpers import tiny_run


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One LoRA run and everything it left."""
    root = tmp_path_factory.mktemp("runs") / "questions"
    model, trainer = tiny_run.model(), tiny_run.trainer(root)
    fresh = tiny_run.model()
    fresh.configure_model()
    summary = finetune(
        model, trainer, tiny_run.data_module(tiny_data), [LoRA(dim=4)], tiny_run.optim(), recipe_text="recipe"
    )
    return {"root": root, "model": model, "trainer": trainer, "summary": summary, "base": checksums(base(fresh))}


def base(model: Any) -> Any:
    return [(n, p) for n, p in model.named_parameters() if ".adapters." not in n]


def test_summary_has_the_documented_fields(run: dict) -> None:
    summary = json.loads((run["root"] / "summary.json").read_text())
    assert summary == run["summary"]
    assert list(summary) == [
        "recipe_sha256", "seed", "steps", "train_loss", "val_loss", "metrics", "tokens_per_second",
        "peak_memory_bytes", "trainable_parameters", "total_parameters", "adapter_path",
    ]  # fmt: skip
    assert summary["steps"] == 8 and summary["seed"] == 1234
    assert summary["adapter_path"] == str(run["root"] / "adapter")
    assert summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 10**7


def test_parameters_are_counted_whole(run: dict) -> None:
    adapters = sum(p.numel() for n, p in run["model"].named_parameters() if ".adapters." in n)
    assert run["summary"]["trainable_parameters"] == adapters
    assert run["summary"]["total_parameters"] == adapters + tiny_run.SHAPE.total_parameters()


def test_training_helps_and_leaves_the_base_alone(run: dict) -> None:
    report = next(c for c in run["trainer"].callbacks if isinstance(c, Report))
    assert [step for step, _ in report.train] == list(range(1, 9))
    assert [step for step, _ in report.validation] == [4, 8]
    assert run["summary"]["val_loss"] == min(loss for _, loss in report.validation) < report.train[0][1]
    assert checksums(base(run["model"])) == run["base"]


def test_saved_adapter_is_the_trained_one(run: dict, tiny_data: Path) -> None:
    """Loaded into a fresh model, the artifact gives the logits of the model in memory (the last step was the best)."""
    again = tiny_run.model()
    again.configure_model()
    again.load_adapters(run["root"] / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids), run["model"].eval()(ids))


def test_logs_and_picture_are_there(run: dict) -> None:
    with open(run["root"] / "logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {name for row in rows for name, value in row.items() if value}
    assert {"train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second"} <= logged
    assert list((run["root"] / "logs" / "version_0").glob("events.out.tfevents*"))
    assert (run["root"] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_lightnings_defaults_are_replaced_and_the_users_callbacks_kept(run: dict, tmp_path: Path) -> None:
    kinds = [type(c).__name__ for c in run["trainer"].callbacks]
    assert kinds == [
        "LoRA", "Room", "Throughput", "SelfCheck", "AdapterCheckpoint", "Report", "Banner", "Progress", "Samples",
        "TrainingState",
    ]  # fmt: skip
    mine = [ModelCheckpoint(dirpath=tmp_path), Callback(), AdapterCheckpoint(monitor="other")]
    trainer = tiny_run.trainer(tmp_path, callbacks=list(mine), enable_progress_bar=False)
    equip(trainer, [], RunFacts(seed=1))
    assert set(mine) <= set(trainer.callbacks)
    kinds = [type(c).__name__ for c in trainer.callbacks]
    assert kinds.count("AdapterCheckpoint") == 1 and "Progress" not in kinds


def test_configured_callbacks_are_told_what_the_run_is(tmp_path: Path) -> None:
    mine = [Report(directory=str(tmp_path)), AdapterCheckpoint(monitor="other")]
    equip(tiny_run.trainer(tmp_path, callbacks=list(mine)), [], RunFacts(7, "text"))
    assert [callback.facts for callback in mine] == [RunFacts(7, "text")] * 2
    assert Report().facts == RunFacts() == AdapterCheckpoint().facts


def test_same_seed_same_losses_and_another_seed_others(run: dict, tiny_data: Path, tmp_path: Path) -> None:
    def losses(name: str, seed: int) -> list[float]:
        trainer = tiny_run.trainer(tmp_path / name, max_steps=2, limit_val_batches=0)
        finetune(tiny_run.model(), trainer, tiny_run.data_module(tiny_data), [LoRA(dim=4)], tiny_run.optim(), seed=seed)
        return [loss for _, loss in next(c for c in trainer.callbacks if isinstance(c, Report)).train]

    assert losses("a", 7) == losses("b", 7) != losses("c", 8)


def test_full_fine_tuning_differs_by_one_field(tiny_data: Path, tmp_path: Path) -> None:
    model = tiny_run.model()
    data = tiny_run.data_module(tiny_data)
    summary = finetune(model, tiny_run.trainer(tmp_path, max_steps=3), data, None, tiny_run.optim())
    assert summary["trainable_parameters"] == summary["total_parameters"] == tiny_run.SHAPE.total_parameters()
    assert summary["adapter_path"] == str(tmp_path / "model")
    again = tiny_run.GPT(tiny_run.SHAPE, checkpoint=str(tmp_path / "model"))
    again.configure_model()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(again.eval()(ids), model.eval()(ids), atol=1e-6)


class Worse(Callback):
    """Makes the second validation look worse than the first."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("judged", float(trainer.global_step))


def test_best_is_kept_and_the_last_stands_beside_it(tiny_data: Path, tmp_path: Path) -> None:
    trainer = tiny_run.trainer(tmp_path, callbacks=[Worse(), AdapterCheckpoint(monitor="judged")])
    data = tiny_run.data_module(tiny_data)
    finetune(tiny_run.model(), trainer, data, [LoRA(dim=4)], tiny_run.optim(schedule="constant"))
    steps = {
        name: json.loads((tmp_path / name / "adapter_config.json").read_text())["step"]
        for name in ("adapter", "adapter-last")
    }
    assert steps == {"adapter": 4, "adapter-last": 8}


def test_without_validation_the_last_is_the_result(tiny_data: Path, tmp_path: Path) -> None:
    trainer = tiny_run.trainer(tmp_path, max_steps=2, limit_val_batches=0)
    summary = finetune(tiny_run.model(), trainer, tiny_run.data_module(tiny_data), [LoRA(dim=4)], tiny_run.optim())
    assert summary["val_loss"] is None
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["step"] == 2
    assert not (tmp_path / "adapter-last").exists()


def test_metrics_before_and_after_come_from_a_callback(tiny_data: Path, tmp_path: Path) -> None:
    seen: list[bool] = []

    def evaluate(trainer: Any, model: Any) -> dict[str, float]:
        seen.append(model.training)
        return {"steps_done": trainer.global_step}

    trainer = tiny_run.trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[BeforeAfter(evaluate)])
    summary = finetune(tiny_run.model(), trainer, tiny_run.data_module(tiny_data), [LoRA(dim=4)], tiny_run.optim())
    assert summary["metrics"] == {"steps_done": {"before": 0.0, "after": 2.0}}
    assert seen == [False, False]


def test_what_is_no_transform_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"'lora', which is no PEFT transform"):
        finetune(tiny_run.model(), tiny_run.trainer(tmp_path), tiny_run.data_module(tiny_data), ["lora"])  # type: ignore[list-item]


def test_lightnings_own_strategy_on_one_device_trains_alike(tiny_data: Path, tmp_path: Path) -> None:
    """Without our strategy the model's own training step runs: same losses, no training state."""

    def losses(name: str, **options: Any) -> list[float]:
        trainer = tiny_run.trainer(tmp_path / name, gradient_clip_val=None, **options)
        finetune(tiny_run.model(), trainer, tiny_run.data_module(tiny_data), [LoRA(dim=4)], tiny_run.optim(eps=1e-4))
        report = next(c for c in trainer.callbacks if isinstance(c, Report))
        return [loss for _, loss in report.train + report.validation]

    assert losses("plain", strategy="auto") == pytest.approx(losses("ours"), rel=1e-5)
    assert not (tmp_path / "plain" / "checkpoints").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 50},
        {"val_check_interval": 1.0, "check_val_every_n_epoch": 1},
        {"val_check_interval": 1.0, "check_val_every_n_epoch": 9, "max_steps": -1, "max_epochs": 1},
    ],
    ids=["beyond max_steps", "beyond the first epoch", "beyond max_epochs"],
)
def test_a_validation_that_would_never_be_due_runs_at_the_end(options: dict, tiny_data: Path, tmp_path: Path) -> None:
    trainer = tiny_run.trainer(tmp_path, **{"max_steps": 2, "enable_progress_bar": False, **options})
    finetune(tiny_run.model(), trainer, tiny_run.data_module(tiny_data), [LoRA(dim=4)], tiny_run.optim())
    report = next(c for c in trainer.callbacks if isinstance(c, Report))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step for step, _ in report.validation] == [trainer.global_step] and summary["val_loss"] is not None


def test_an_interval_beyond_one_pass_names_the_field(tiny_data: Path, tmp_path: Path) -> None:
    trainer = tiny_run.trainer(tmp_path, val_check_interval=50, check_val_every_n_epoch=1)
    with pytest.raises(ConfigError, match="trainer.val_check_interval=50 is more than the steps of one pass"):
        finetune(tiny_run.model(), trainer, tiny_run.data_module(tiny_data), [LoRA(dim=4)], tiny_run.optim())


@pytest.mark.parametrize("strategy", ["auto", None])
@pytest.mark.parametrize("how", ["option", "callback"])
def test_batches_are_not_accumulated_by_lightning(how: str, strategy: Any, tiny_data: Path, tmp_path: Path) -> None:
    """A mean of means: rows with few answer tokens would weigh more."""
    options: dict[str, Any] = {"strategy": strategy} if strategy else {}
    if how == "option":
        options["accumulate_grad_batches"] = 2
    else:
        options["callbacks"] = [GradientAccumulationScheduler({0: 1, 1: 2})]
    trainer = tiny_run.trainer(tmp_path, **options)
    model = tiny_run.model()
    model.add_adapter(LoRA(dim=4))
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2 must stay 1"):
        trainer.fit(model, datamodule=tiny_run.data_module(tiny_data))
