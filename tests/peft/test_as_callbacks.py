"""A transform is a Lightning callback: it attaches itself, once, before the model is built."""

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from graftwork.models import GPT
from graftwork.optim import AdamW
from graftwork.peft import IA3, CanonicalAdapter, LoRA
from tests.contracts.methods import batch, make, same, shape


def trainer(directory: Path, callbacks: list[Any], **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary"], False)
    return Trainer(
        accelerator="cpu", devices=1, max_steps=2, default_root_dir=directory, callbacks=callbacks, **quiet, **options
    )


def rows() -> DataLoader:
    model = make()
    return DataLoader([batch(model, seed=seed) for seed in (1, 2)], batch_size=None)


def fit(runner: Trainer, model: LightningModule) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning on few workers and validation loops
        runner.fit(model, rows())


def test_callbacks_attach_in_list_order_and_once(tmp_path: Path) -> None:
    stack = [LoRA(dim=4), LoRA("second", dim=2), CanonicalAdapter(dim=4)]
    assert len({t.state_key for t in stack}) == 3
    model = GPT(shape(), dtype="fp32")
    model.optim = AdamW(lr=1e-2)
    runner = trainer(tmp_path, stack)
    fit(runner, model)
    assert list(model.adapters) == ["lora", "second", "canonical_adapter"]
    assert all(adapter.moved() for adapter in model.stack.adapters())
    assert all(p.requires_grad == (".adapters." in n) for n, p in model.named_parameters())
    fresh = GPT(shape(), dtype="fp32")
    fresh.configure_model()
    base = {n: p for n, p in model.named_parameters() if ".adapters." not in n}
    assert same(base, dict(fresh.named_parameters()))
    attached = dict(model.adapters)
    fit(trainer(tmp_path, stack), model)
    assert model.adapters == attached


def test_lightning_checkpoints_hold_only_what_trains(tmp_path: Path) -> None:
    model = GPT(shape(), dtype="fp32")
    runner = trainer(tmp_path, [LoRA(dim=4), IA3()])
    fit(runner, model)
    (file,) = tmp_path.rglob("*.ckpt")
    state = torch.load(file, weights_only=True)["state_dict"]
    assert set(state) == {n for n, _ in model.named_parameters() if ".adapters." in n}
