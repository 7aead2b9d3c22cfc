"""Lightning's precision plugin, reduced to what is left to do: clipping over the whole model."""

from typing import Any

from lightning.pytorch.plugins.precision import Precision

from graftwork.training.optimizer.gradients import Gradients


class ModelParallelPrecision(Precision):
    """Clipping that knows the norm of the whole model; the arithmetic's precision is the model's dtype."""

    gradients: Gradients | None = None

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Clip by the global norm that the step has just measured."""
        assert self.gradients is not None
        self.gradients.clip(float(clip_val))

    def clip_grad_by_value(self, optimizer: Any, clip_val: float) -> None:
        """Clip every element of the gradients."""
        assert self.gradients is not None
        self.gradients.clip_values(float(clip_val))
