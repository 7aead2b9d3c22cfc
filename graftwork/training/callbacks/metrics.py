"""Metrics of the task before and after training, with whatever function the caller brings."""

from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from pydantic import BaseModel

from graftwork.errors import CheckpointError
from graftwork.inference.metrics import COMPARED
from graftwork.jsonfile import validated
from graftwork.training.summary import Metrics

Confusion = dict[str, dict[str, int]]
"""Counts by right answer and by what was said."""
Evaluate = Callable[[Trainer, LightningModule], Mapping[str, object]]


class _Saved(BaseModel):
    metrics: Metrics
    confusion: dict[str, Confusion] = {}


class BeforeAfter(Callback):
    """Calls ``evaluate(trainer, model)`` on every rank before the first and after the last step.

    ``metrics`` is {name: {"before": value, "after": value}}; a resumed run keeps the value from before its first step.
    ``evaluate`` returns numbers by name, or what ``evaluate_model`` does: then loss, exact match and accuracy are
    compared and the confusions before and after kept.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.metrics: Metrics = {}
        self.confusion: dict[str, Confusion] = {}

    def state_dict(self) -> dict[str, object]:
        """Keep what was measured."""
        return {"metrics": self.metrics, "confusion": self.confusion}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was measured."""
        saved = validated(state_dict, _Saved, "what was measured before", CheckpointError)
        self.metrics, self.confusion = saved.metrics, saved.confusion

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
        figures = self.evaluate(trainer, pl_module)
        for name in COMPARED if "answer_tokens" in figures else figures:
            if name in figures:
                self.metrics.setdefault(name, {})[when] = float(cast(SupportsFloat, figures[name]))
        if "confusion" in figures:
            self.confusion[when] = cast(Confusion, figures["confusion"])
        pl_module.train(training)
