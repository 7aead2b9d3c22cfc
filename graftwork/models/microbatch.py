"""A microbatch's targets: only they reach the output layer, and the loss is read from the hidden states at them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graftwork.batch import Batch
from graftwork.core.loss import head_loss
from graftwork.models.loss import Loss, answer_rows, summed_loss, token_losses
from graftwork.peft.cuts import Region
from graftwork.peft.routing import at_positions, routed
from graftwork.peft.wrapper import AdaptedModule


@contextmanager
def headless(chunk: nn.Module) -> Iterator[None]:
    """Let a chunk return what its output layer would read, inside the block; one without such a layer does anyway."""
    had = chunk.post_process
    vars(chunk)["post_process"] = False
    try:
        yield
    finally:
        vars(chunk)["post_process"] = had


@dataclass(frozen=True)
class Targets:
    """The positions of a microbatch that have a target, on the last stage's ``chunk``, which has run ``batch``.

    Hidden states [s, b, h] are the chunk's own, without its output layer; under sequence parallelism this rank's part.
    """

    chunk: nn.Module
    batch: Batch
    vocab_size: int

    def loss(self, hidden: Tensor) -> Loss:
        """Return (sum of the losses, their number, both by name): megatron-core's ``loss_func``.

        Logits exist for a block of positions at a time, unless an adapter stands at the output layer: then it is run
        as it is, and all positions with a target have logits.
        """
        rows = answer_rows(self.batch.labels)
        targets = self.batch.labels.reshape(-1)[rows]
        if _adapted(self._model.output_layer):
            return summed_loss(token_losses(self.logits(hidden), targets, self.vocab_size).sum(), len(rows))
        return summed_loss(head_loss(self._entered(rows, hidden), self._weight, targets, self.vocab_size), len(rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's part of the logits [n, v/tp] at the targets."""
        rows = answer_rows(self.batch.labels)
        with routed(self.batch.routes):
            if self._model.config.sequence_parallel:  # the output layer, and adapters at it, gather the sequence
                return self._project(hidden).transpose(0, 1).flatten(0, 1)[rows]
            with at_positions(rows, *hidden.shape[1::-1]):
                return self._project(_at(rows, hidden).unsqueeze(1)).squeeze(1)

    def _entered(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Return the hidden states [n, h] at ``rows`` in the tensor-parallel region: no more than these are sent."""
        region = Region.of(self._model.config)
        if self._model.config.sequence_parallel:  # a rank has rows of its own part of the sequence only
            return _at(rows, region.enter(hidden))
        return region.enter(_at(rows, hidden))

    @property
    def _model(self) -> Any:
        return self.chunk

    @property
    def _weight(self) -> Tensor:
        model = self._model
        tied = model.share_embeddings_and_output_weights
        weight: Tensor = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
        return weight

    def _project(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.output_layer(hidden, weight=self._weight)[0]
        return logits


def _adapted(head: nn.Module) -> bool:
    return isinstance(head, AdaptedModule) and any(head.active())


def _at(rows: Tensor, hidden: Tensor) -> Tensor:
    """Return hidden states [n, h] at flat indices [n] of [b, s], out of [s, b, h]."""
    length, batch, width = hidden.shape
    return hidden.reshape(-1, width)[rows % length * batch + rows // length]
