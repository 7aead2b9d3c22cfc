"""A microbatch's targets: only they reach the output layer, and the loss is read from their logits."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from graftwork.models.loss import LossFunction, answer_rows, summed_loss, token_losses
from graftwork.peft.routing import only_positions


class Targets:
    """Notes the positions that have a target while a chunk runs: most positions of a prompt need no logits.

    ``keep`` is a forward hook of the stack of layers in front of the output layer.
    """

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    @contextmanager
    def only(self, labels: Tensor, scattered: bool) -> Iterator[Tensor]:
        """Drop all other positions inside the block, and give the flat indices [n] of those of ``labels`` [b, s].

        ``scattered``: hidden states hold only a part of the sequence, so that nothing is dropped.
        """
        rows = answer_rows(labels)
        self._rows = None if scattered else rows
        try:
            yield rows
        finally:
            self._rows = None

    def keep(self, stack: nn.Module, arguments: object, hidden: Tensor) -> Tensor | None:
        """Hand only positions with a target to the output layer: [s, b, h] -> [n, 1, h]; the rest has no loss."""
        if self._rows is None:
            return None
        only_positions(self._rows, hidden.shape[1], hidden.shape[0])
        return hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])[self._rows].unsqueeze(1)


def loss_of(labels: Tensor, rows: Tensor, scattered: bool, vocab_size: int) -> LossFunction:
    """Return the function that reads the loss at ``rows`` of ``labels``; ``scattered``: from logits everywhere."""

    def loss_function(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits = output.reshape(-1, output.shape[-1])
        logits = logits[rows] if scattered else logits
        return summed_loss(token_losses(logits, labels.reshape(-1)[rows], vocab_size))

    return loss_function
