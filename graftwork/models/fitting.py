"""A model that Lightning fits: its steps on one device without our strategy, and what any strategy asks of it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.errors import ParallelismError, TrainingError
from graftwork.models.generating import Generating
from graftwork.optim import AdamW


class Fitting(Generating):
    """A model with ``forward_step``; ``optim`` builds its optimizer (None: ``AdamW()``)."""

    def __init__(self) -> None:
        super().__init__()
        self.optim: Any = None
        self.strict_loading = False  # checkpoints hold only what trains
        self._validation: list[Tensor] = []

    def forward_step(self, data_iterator: Iterator[dict[str, Any]], module: nn.Module) -> tuple[Tensor, Any]:
        """Return one microbatch's output and the function that reads (loss sum, tokens, report) from it."""
        raise TypeError(f"{type(self).__name__} must say how it runs a microbatch.")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the batch's mean answer-token loss (one device; MegatronStrategy drives its own steps)."""
        loss_sum, count = self._loss(batch)
        if not count:
            raise TrainingError(f"Batch {batch_idx} has no answer token; every row was cut off before its answer.")
        loss = loss_sum / count
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=int(count))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the batch to the exact validation loss: sum of token losses / number of tokens."""
        loss_sum, count = self._loss(batch)
        self._validation.append(torch.stack([loss_sum.detach().double(), count.double()]))

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` over the whole validation set."""
        if self._validation:
            loss_sum, count = torch.stack(self._validation).sum(0)
            self._validation = []
            self.log("val_loss", (loss_sum / count).float(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Return ``self.optim`` (default ``AdamW()``) built over what trains, scheduled per step."""
        steps = self.trainer.estimated_stepping_batches
        optimizer, schedule = (self.optim or AdamW()).build(self, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Refuse what would train silently wrong; note how the rows are put to the model."""
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1 and not getattr(strategy, "drives_backward", False):
            raise ParallelismError(
                f"{type(strategy).__name__} does not know megatron-core's parallel layout; "
                "use graftwork.training.MegatronStrategy for several devices."
            )
        if self._stack is not None and self._stack.merged:
            raise TrainingError("Adapters are merged into the base; call model.unmerge_adapters() before training.")
        prompt = getattr(self.trainer.datamodule, "prompt_format", None)  # type: ignore[attr-defined]
        if prompt and self._stack is not None:
            self._stack.remember_prompt_format(prompt)

    def optimizer_zero_grad(self, *arguments: Any, **options: Any) -> None:
        """Zero gradients, unless the strategy drives the backward pass: Lightning asks for this after it."""
        if not getattr(self.trainer.strategy, "drives_backward", False):
            super().optimizer_zero_grad(*arguments, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains in Lightning's checkpoint: the adapters, or all weights in full fine-tuning."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint.get("state_dict", {}).items() if k in trained}

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        output, loss_func = self.forward_step(iter([batch]), self.chunks[0])
        loss_sum, count, _ = loss_func(output)
        return loss_sum, count
