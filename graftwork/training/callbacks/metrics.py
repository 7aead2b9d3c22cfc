"""Metrics of the task before and after training, with whatever function the caller brings."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from pydantic import BaseModel

from graftwork.errors import CheckpointError
from graftwork.jsonfile import validated
from graftwork.training.summary import Metrics

Evaluate = Callable[[Trainer, LightningModule], Mapping[str, float]]


class _Saved(BaseModel):
    metrics: Metrics


class BeforeAfter(Callback):
    """Calls ``evaluate(trainer, model)`` on every rank before the first and after the last step.

    ``metrics`` is {name: {"before": value, "after": value}}; a resumed run keeps the value from before its first step.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.metrics: Metrics = {}

    def state_dict(self) -> dict[str, object]:
        """Keep what was measured."""
        return {"metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was measured."""
        self.metrics = validated(state_dict, _Saved, "what was measured before", CheckpointError).metrics

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the untrained model, unless a resumed run has done so."""
        if not self.metrics:
            self._measure("before", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained model."""
        self._measure("after", trainer, pl_module)

    def _measure(self, when: str, trainer: Trainer, pl_module: LightningModule) -> None:
        training = pl_module.training
        pl_module.eval()
        for name, value in self.evaluate(trainer, pl_module).items():
            self.metrics.setdefault(name, {})[when] = float(value)
        pl_module.train(training)
