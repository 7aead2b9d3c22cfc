"""A fine-tuning run small enough for a test: real model, real data module, real strategy."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from graftwork import training
from graftwork.data.sft import SFTDataModule
from graftwork.models.gpt import GPT
from graftwork.models.shapes import Shape
from graftwork.optim import AdamW
from graftwork.training import MegatronStrategy
from graftwork.training.summary import Summary
from tests.helpers.tiny_tokenizer import tiny_tokenizer

SHAPE = Shape(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=301,
    max_position_embeddings=64,
)


def write_data(root: Path) -> Path:
    """Write tokenizer and a training file whose answers follow from the questions; return ``root``."""
    tiny_tokenizer(root / "tokenizer", SHAPE.vocab_size)
    words = ("sun", "film", "girl", "story")
    rows = [
        {"input": f"Question {i} about the {w}", "output": "positive" if w in ("sun", "girl") else "negative, slow"}
        for i in range(12)
        for w in words
    ]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def data_module(root: Path, **options: Any) -> SFTDataModule:
    """Read what ``write_data`` wrote."""
    settings: dict[str, Any] = {"seq_length": 48, "global_batch_size": 8, "micro_batch_size": 2}
    settings["validation_fraction"] = 0.25
    return SFTDataModule(
        train=str(root / "train.jsonl"),
        tokenizer=str(root / "tokenizer"),
        cache_dir=str(root / "cache"),
        **(settings | options),
    )


def trainer(run: Path, world_size: int = 1, layout: dict[str, Any] | None = None, **options: Any) -> Trainer:
    """Return a trainer of eight steps with a validation every four."""
    settings: dict[str, Any] = {
        "max_steps": 8,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "num_sanity_val_steps": 0,
    }
    os.environ.setdefault("LOCAL_RANK", "0")
    settings["strategy"] = MegatronStrategy(**(layout or {}))
    return Trainer(accelerator="cpu", devices=world_size, default_root_dir=run, **(settings | options))


def finetune(*args: Any, **options: Any) -> Summary:
    """Call ``finetune`` without samples on the way, which cost a tiny model more than its training."""
    return training.finetune(*args, **({"samples": 0} | options))


def model(**options: Any) -> GPT:
    """Return the model, not yet built."""
    return GPT(SHAPE, **options)


def optim(**options: Any) -> AdamW:
    """Return a fast optimizer."""
    return AdamW(**({"lr": 5e-3, "warmup_steps": 2} | options))


class StopAfter(Callback):
    """Asks the run to stop, as Slurm would, while step ``step`` is running."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Send this process SIGUSR1."""
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)
