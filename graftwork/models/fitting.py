"""What Lightning's loops need of a model beside its steps: exact validation loss, refusals, what a checkpoint keeps."""

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from graftwork.errors import ConfigError, ParallelismError, TrainingError
from graftwork.peft.stack import Stack


class SchedulesSteps:
    """A strategy that runs forward, backward and gradient sums of a step itself, over megatron-core's parallel layout.

    Lightning's own backward pass, and its zeroing of gradients, must then do nothing.
    """


class ValidationLoss:
    """Exact loss over a validation set: the sum of all token losses over their number, however batches cut the set."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, loss_sum: Tensor, count: Tensor) -> None:
        """Add a batch's summed loss and number of answer tokens."""
        self._sums.append(torch.stack([loss_sum.detach().double(), count.double()]))

    def take(self) -> Tensor | None:
        """Return the mean loss of an answer token, fp32, and start anew; None where no batch was added."""
        if not self._sums:
            return None
        loss_sum, count = torch.stack(self._sums).sum(0).unbind()
        self._sums = []
        return torch.div(loss_sum, count).float()


def schedules_steps(trainer: pl.Trainer) -> bool:
    """Tell whether the strategy makes the gradients itself."""
    return isinstance(trainer.strategy, SchedulesSteps)


def refuse_unfit(trainer: pl.Trainer, stack: Stack | None, context: int) -> None:
    """Raise what stops a fit that would train silently wrong: ConfigError, ParallelismError, TrainingError.

    ``context``: the longest row that the model knows the positions of.
    """
    if trainer.world_size > 1 and not schedules_steps(trainer):
        raise ParallelismError(
            f"{type(trainer.strategy).__name__} does not know megatron-core's parallel layout; "
            "use graftwork.training.MegatronStrategy for several devices."
        )
    refuse_accumulation(trainer)
    refuse_long_rows(trainer, context)
    if stack is not None and stack.merged:
        raise TrainingError("Adapters are merged into the base; call model.unmerge_adapters() before training.")


def refuse_accumulation(trainer: pl.Trainer) -> None:
    """Raise ConfigError when Lightning sums batches: a mean of their means is not the mean of all answer tokens."""
    given: list[pl.Callback] = getattr(trainer, "callbacks", [])
    planned = [c.scheduling.values() for c in given if isinstance(c, GradientAccumulationScheduler)]
    most = max([trainer.accumulate_grad_batches, *(count for counts in planned for count in counts)])
    if most != 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={most} must stay 1: set the data's global_batch_size and "
            "micro_batch_size instead."
        )


def refuse_long_rows(trainer: pl.Trainer, context: int) -> None:
    """Raise ConfigError when the data may give rows, virtual tokens included, that are longer than ``context``."""
    length = getattr(getattr(trainer, "datamodule", None), "seq_length", None)
    if isinstance(length, int):
        refuse_length(length, context)


def refuse_length(length: int, context: int) -> None:
    """Raise ConfigError for rows of ``length`` tokens where a model's positions reach only ``context``."""
    if length > context:
        raise ConfigError(
            f"data.seq_length={length} is longer than the model's context: max_position_embeddings={context} is the "
            "most that its positions reach, unless its config.json extends them (rope_scaling and the larger maximum)."
        )


def prompt_format_of(trainer: pl.Trainer) -> dict[str, object]:
    """Return how the trainer's data put their rows to the model; {} for data that do not say."""
    data = getattr(trainer, "datamodule", None)
    return dict(getattr(data, "prompt_format", None) or {})


def trained_only(state: dict[str, object], parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, object]:
    """Return the entries of a state_dict that train: the adapters, or all weights in full fine-tuning."""
    trained = {name for name, parameter in parameters if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in trained}
