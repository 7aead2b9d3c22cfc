"""A run whose saves are proved is the run without: losses, adapters and random numbers, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.errors import ArtifactError
from graftwork.peft import LoRA, PTuning
from graftwork.peft.artifact import directory as artifact
from graftwork.training.callbacks import AdapterCheckpoint
from tests.helpers import tiny_run
from tests.helpers.tiny_run import finetune


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_data(tmp_path_factory.mktemp("rows"))


def train(run: Path, rows: Path, verify: bool) -> list[Any]:
    """Train with dropout, saving after each validation; return tensors, losses and what random numbers come next."""
    keeps = AdapterCheckpoint(verify=verify)
    trainer = tiny_run.trainer(run, val_check_interval=2, callbacks=[keeps])
    stack = [LoRA(dim=4, dropout=0.2), PTuning(virtual_tokens=2, embedding_dim=8, bottleneck_dim=8)]
    summary = finetune(tiny_run.model(), trainer, tiny_run.data_module(rows), stack, tiny_run.optim())
    files = [file.read_bytes() for file in sorted(run.glob("adapter*/adapter_model.safetensors"))]
    return [files, summary["val_loss"], summary["train_loss"], torch.get_rng_state().tolist()]


def test_training_goes_on_exactly(rows: Path, tmp_path: Path) -> None:
    proved, plain = (train(tmp_path / str(verify), rows, verify) for verify in (True, False))
    assert proved == plain and proved[0]
    held = json.loads((tmp_path / "True" / "adapter" / "proof.json").read_text())
    assert [view["adapters"] for view in held["views"]] == [[], ["lora", "ptuning"], ["lora"], ["ptuning"]]
    assert not (tmp_path / "False" / "adapter" / "proof.json").exists()


def test_a_run_stops_where_its_adapter_is_written_wrong(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = artifact.save_file

    def halved(tensors: dict[str, torch.Tensor], *where: Any, **options: Any) -> None:
        exact({key: tensor / 2 for key, tensor in tensors.items()}, *where, **options)

    monkeypatch.setattr(artifact, "save_file", halved)
    with pytest.raises(ArtifactError, match="fails its proof"):
        train(tmp_path / "run", rows, verify=True)
    assert not (tmp_path / "run" / "adapter").exists()
