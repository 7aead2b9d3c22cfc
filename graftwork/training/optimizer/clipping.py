"""Lightning's precision plugin, reduced to what is left to do: it hands clipping and step to the update."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch.optim import Optimizer

from graftwork.training.optimizer.update import Update


class ModelParallelPrecision(Precision):
    """Clipping that knows the norm of the whole model; the arithmetic's precision is the model's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self._update: Update | None = None

    def serve(self, update: Update) -> None:
        """Clip and step through ``update`` from now on."""
        self._update = update

    @property
    def update(self) -> Update:
        """What clips and steps."""
        assert self._update is not None, "clipping and steps belong to a fit"
        return self._update

    def optimizer_step(  # type: ignore[override]  # as Lightning's own, narrower than its base
        self, optimizer: Steppable, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step after ``closure``, the hooks that may look at the gradients, and clipping."""
        assert isinstance(optimizer, Optimizer) and not kwargs
        return self.update.step(optimizer, partial(self._wrap_closure, model, optimizer, closure))

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip by the global norm that the step has just measured."""
        self.update.clip(float(clip_val))

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip every element of the gradients."""
        self.update.clip_values(float(clip_val))
