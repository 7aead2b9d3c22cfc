"""Runs cells: the real model under the real strategy, two clipped AdamW steps, everything seen under global names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from graftwork.optim import AdamW
from tests.helpers.standin import trainer_for
from tests.parallel.breaks import BREAKS
from tests.parallel.layouts import Cell
from tests.parallel.models import model_of, prompt_of, shake
from tests.parallel.rows import STEPS, Rows
from tests.parallel.whole import whole

CLIP = 0.1
LEARNING: dict[str, Any] = {"lr": 3e-3, "eps": 1e-2, "schedule": "constant"}
"""With Adam's own small eps the rounding of a gradient that is nearly zero would become a step of the size of lr."""


@dataclass
class Outcome:
    """What one rank knows of a cell; tensors are whole and under their global names."""

    initial: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    validation: float = 0.0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def run_cells(
    rank: int, world: int, cells: list[Cell], sizes: dict[str, Any], root: Path, breakage: str = ""
) -> list[Outcome]:
    """Train every cell in one process group; ``breakage`` names a deliberate mistake of ``breaks``."""
    if breakage:
        BREAKS[breakage]()
    return [run_cell(rank, world, cell, sizes, root) for cell in cells]


def run_cell(rank: int, world: int, cell: Cell, sizes: dict[str, Any], root: Path) -> Outcome:
    """Train one cell; the base is only validated."""
    model, probe = model_of(cell, root), Probe()
    model.prepare(AdamW(**LEARNING))
    options = {"max_steps": STEPS, "gradient_clip_val": CLIP, "limit_val_batches": 0} if cell.subject != "base" else {}
    trainer = trainer_for(sizes, world, rank, callbacks=[probe], **options)
    if cell.subject == "base":
        trainer.validate(model, datamodule=Rows(cell.packed, cell.routed), verbose=False)
    else:
        trainer.fit(model, datamodule=Rows(cell.packed, cell.routed))
    return probe.outcome


class Probe(Callback):
    """Keeps initial values, then shakes them; keeps logits, losses, the first gradients, the trained weights."""

    def __init__(self, shaken: bool = True) -> None:
        self.outcome, self.shaken = Outcome(), shaken

    def on_fit_start(self, trainer: Trainer, model: Any) -> None:
        """Keep what adapters are born with, then start from values that are nowhere zero."""
        self.outcome.initial = whole(model)
        if self.shaken:
            shake(model)
        self._keep_logits(model)

    def on_validation_start(self, trainer: Trainer, model: Any) -> None:
        """Keep the base's logits."""
        self._keep_logits(model)

    def on_validation_end(self, trainer: Trainer, model: Any) -> None:
        """Keep the base's loss."""
        self.outcome.validation = float(trainer.callback_metrics["val_loss"])

    def on_before_optimizer_step(self, trainer: Trainer, model: Any, optimizer: Any) -> None:
        """Keep the first step's gradients, not yet clipped."""
        if not self.outcome.losses:
            self.outcome.gradients = whole(model, gradients=True)

    def on_train_batch_end(self, trainer: Trainer, model: Any, *_: Any) -> None:
        """Keep the step's loss and gradient norm."""
        self.outcome.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.outcome.norms.append(float(trainer.callback_metrics["grad_norm"]))

    def on_train_end(self, trainer: Trainer, model: Any) -> None:
        """Keep the trained weights."""
        self.outcome.weights = whole(model)

    def _keep_logits(self, model: Any) -> None:
        prompt = prompt_of(model)
        ids = torch.tensor([[*prompt, 5, 7, 11, 13, 17, 19, 4], [*prompt, 2, 3, 23, 29, 31, 37, 60]])
        with torch.no_grad():
            self.outcome.logits = (model(ids, ids[:, len(prompt) :]) if model.seq2seq else model(ids)).clone()
