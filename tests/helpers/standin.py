"""A LightningModule with the interface that the strategy drives, over the tiny GPT; no adapters, no checkpoint."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from graftwork import parallel
from graftwork.batch import IGNORED, Batch
from graftwork.models.loss import LossFunction
from graftwork.optim import AdamW
from graftwork.training.strategy import MegatronStrategy
from tests.helpers import tiny_gpt
from tests.helpers.zigzag import local_rows


class StandIn(LightningModule):
    """``train``: "all" parameters, only the linears of ``layers``, or those whose name contains the given text."""

    def __init__(self, train: str = "all", optim: AdamW | None = None, tied: bool = False, **config: Any) -> None:
        super().__init__()
        self.train_what, self.tied, self.config_overrides = train, tied, config
        self.optim = optim or AdamW(lr=1e-2, warmup_steps=2, eps=1e-3)  # a small eps turns rounding into +-lr
        self.adapters: dict[str, Any] = {}
        self.saved: list[str] = []

    def configure_model(self) -> None:
        """Build this rank's chunks under the trainer's layout."""
        if hasattr(self, "module"):
            return
        layout = self.trainer.strategy.layout
        config = tiny_gpt.config(**(layout.transformer_fields() | self._numerics() | self.config_overrides))
        virtual = layout.virtual_pipeline_model_parallel_size
        chunks = [tiny_gpt.build(config, vp, self.tied) for vp in (range(virtual) if virtual else [None])]
        self.module = nn.ModuleList(chunks) if virtual else chunks[0]
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(self.train_what in ("all",) or self.train_what in name)

    @staticmethod
    def _numerics() -> dict[str, Any]:
        return {"calculate_per_token_loss": True, "num_layers": 2}

    def prepare(self, optim: AdamW | None = None, seed: int | None = None) -> None:
        """Take the run's optimizer; the weights depend on names only."""
        self.optim = optim or self.optim

    def forward_step(self, iterator: Iterator[Batch], module: nn.Module) -> tuple[Tensor, LossFunction]:
        """Take one microbatch; return (losses [b, s], function to (sum, tokens, logs))."""
        batch = next(iterator)
        size, rank = parallel.cp_size(), parallel.cp_rank()
        tokens, labels, positions = (
            local_rows(t, 1, rank, size) for t in (batch.tokens, batch.labels, batch.position_ids)
        )
        keep = labels != IGNORED
        output = module(tokens, positions, None, labels=labels.clamp(min=0))
        return output, lambda losses: _total(losses, keep)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Never called: the strategy drives."""
        raise AssertionError

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Never called: the strategy drives."""
        raise AssertionError

    def configure_optimizers(self) -> dict[str, Any]:
        """Build the optimizer as the real model does."""
        optimizer, scheduler = self.optim.build(self, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Leave the gradients that the strategy has just made."""

    def save_adapters(self, path: str | Path, **about: Any) -> None:
        """Write a marker with one weight, so that tests see which moment was saved."""
        Path(path).mkdir(parents=True, exist_ok=True)
        torch.save(sum(p.double().sum() for p in self.parameters() if p.requires_grad), Path(path, "sum.pt"))
        self.saved.append(Path(path).name)

    export_hf = save_adapters


def _total(losses: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, tokens = losses.float()[keep].sum(), keep.sum().int()
    return total, tokens, {"loss_sum": total.detach().clone(), "num_tokens": tokens}


class Rows(LightningDataModule):
    """Steps of ``global_batch_size`` random rows with answers of very different lengths, cut over replicas."""

    def __init__(self, steps: int = 3, global_batch_size: int = 4, micro_batch_size: int = 1, length: int = 16) -> None:
        super().__init__()
        self.steps, self.length = steps, length
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size

    def train_dataloader(self) -> DataLoader:
        """Return the batches of an epoch."""
        return DataLoader([self.batch(1 + step) for step in range(self.steps)], batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Return two batches of unequal answer tokens."""
        return DataLoader([self.batch(101), self.batch(102)], batch_size=None)

    def batch(self, seed: int) -> Batch:
        """Return this replica's rows of one global batch."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.global_batch_size, self.length + 1)
        ids = torch.randint(0, tiny_gpt.VOCABULARY, shape, generator=generator)
        labels = ids[:, 1:].clone()
        for row in range(shape[0]):
            labels[row, : int(torch.randint(0, self.length - 1, (), generator=generator))] = IGNORED
        tokens, rows = ids[:, :-1].contiguous(), torch.arange(shape[0])[:, None] + 1000 * seed
        positions = torch.arange(self.length).expand(shape[0], -1).contiguous()
        parts = [t[parallel.dp_rank() :: parallel.dp_size()] for t in (tokens, labels, positions, rows)]
        return Batch(*parts[:3], rows=parts[3], micro_batch_size=self.micro_batch_size)


class Curve(Callback):
    """Keeps the loss and gradient norm of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read what the strategy logged."""
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.norms.append(float(trainer.callback_metrics["grad_norm"]))


def trainer_for(layout: dict[str, Any], world_size: int = 1, rank: int = 0, **options: Any) -> Trainer:
    """Return a quiet Trainer whose ranks are the processes of ``run_ranks``.

    Lightning's own environment plugin takes LOCAL_RANK as the sign that somebody else has started the processes; it
    then uses the process group that it finds.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    off = ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"]
    quiet: dict[str, Any] = dict.fromkeys(off, False)
    steps = {"max_steps": 3, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return Trainer(
        accelerator="cpu", devices=world_size, strategy=MegatronStrategy(**layout), **(quiet | steps | options)
    )
