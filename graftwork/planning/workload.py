"""Workload: the rows of a step as sizes, and a microbatch of them without memory."""

from dataclasses import dataclass, replace

import torch

from graftwork.batch import Batch
from graftwork.models.base import Model


@dataclass(frozen=True)
class Workload:
    """What a step trains on, under the names of the data's fields.

    ``answer_share``: share of the positions that have a target (1.0 where rows are not known, the most that can be);
    ``samples``: samples in a packed row.
    """

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    packing: bool = False
    answer_length: int | None = None
    answer_share: float = 1.0
    samples: int = 4

    @property
    def row_tokens(self) -> int:
        """Tokens of a row: of an encoder-decoder those of both."""
        return self.seq_length + (self.answer_length or 0)

    def length(self, context: int = 1) -> int:
        """Tokens of a (packed) row at the most, as ``context`` ranks cut it: every sample may have to be made even."""
        more = self.samples * (2 * context - 1) if self.packing and context > 1 else 0
        return self.seq_length + more + -more % (2 * context)

    def positions(self, context: int = 1) -> int:
        """Positions of a microbatch, on one of ``context`` context-parallel ranks, that may have a target."""
        return self.micro_batch_size * (self.answer_length or self.seq_length) // context

    def targets(self, context: int = 1) -> int:
        """Positions of a microbatch that have a target, on one of ``context`` context-parallel ranks."""
        return max(1, round(self.answer_share * self.positions(context)))

    def microbatch(self, model: Model, context: int = 1) -> Batch:
        """Return a microbatch on the meta device for ``model``: as many rows and tokens as a rank gets."""
        rows, length = self.micro_batch_size, max(1, self.length(context) // context)
        tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
        if model.seq2seq:
            answers = torch.zeros(rows, self.answer_length or length, dtype=torch.int64, device="meta")
            lengths = torch.full((rows,), length, device="meta")
            return replace(Batch.of(answers), source=tokens, source_lengths=lengths)
        batch = Batch.of(tokens)
        if not self.packing:
            return batch
        bounds = torch.linspace(0, length, self.samples + 1).round().to(torch.int32)
        return replace(batch, cu_seqlens=bounds.expand(rows, -1))
