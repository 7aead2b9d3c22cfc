"""The typed batch: rows of tokens with their targets, from the data to megatron-core's schedule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.errors import ParallelismError
from graftwork.routes import Routes
from graftwork.ways import Way

T = TypeVar("T")
IGNORED = -100
"""Label of a position without a target (torch's and transformers' ``ignore_index``)."""

Ids = Sequence[Sequence[int]]
"""Rows of token ids, of any lengths."""


def right_padded(rows: Ids, fill: int, device: torch.device | str) -> Tensor:
    """Return int64 [b, longest] of rows of different lengths, padded behind with ``fill``."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64, device=device)


@dataclass
class Batch:
    """The rows of one step (or microbatch) of a data-parallel rank.

    tokens, labels, position_ids: int64 [b, s]; ``labels[i, t]`` is the token after ``tokens[i, t]``, or IGNORED.
    source int64 [b, se], source_lengths int64 [b]: what the encoder of a sequence-to-sequence model reads, padded on
    the right, and how much of each row is no padding; ``tokens`` are then the decoder's. None in a causal batch.
    cu_seqlens: int32, only in a *packed* batch, whose rows hold several samples each: the boundaries of the samples in
    every row [b, k] (repeated at the end where a row has fewer), or [k] once the rows lie ``in_one_line``.
    routes: which adapters act where, on rows [b, 1] or, in a packed batch, on tokens [b, s]; None: all everywhere.
    rows: int64 [b, k], numbers of the dataset rows in each row, -1 for none. micro_batch_size: rows that go through the
    model together; None: all of them.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None = None
    rows: Tensor | None = None
    micro_batch_size: int | None = None
    source: Tensor | None = None
    source_lengths: Tensor | None = None
    routes: Routes | None = None

    @classmethod
    def of(cls, tokens: Tensor, labels: Tensor | None = None) -> "Batch":
        """Make a batch of right-padded ids [b, s] whose positions count from 0; no labels: no position has a target."""
        wanted = torch.full_like(tokens, IGNORED) if labels is None else labels
        return cls(tokens, wanted, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))

    @classmethod
    def following(cls, prompts: Ids, answers: Ids, device: torch.device | str) -> "Batch":
        """Lay each answer behind its prompt, as a causal model reads them; every token of an answer is a target."""
        pairs = list(zip(prompts, answers, strict=True))
        labels = [[*[IGNORED] * (len(prompt) - 1), *(answer or [IGNORED])] for prompt, answer in pairs]
        return cls.of(
            right_padded([[*prompt, *answer][: len(row)] for (prompt, answer), row in zip(pairs, labels)], 0, device),
            right_padded(labels, IGNORED, device),
        )

    @classmethod
    def answering(cls, prompts: Ids, answers: Ids, start: int, device: torch.device | str) -> "Batch":
        """Give the prompts to the encoder and ``start`` with the answers to the decoder; answers are the targets."""
        read = Batch.following([[start]] * len(prompts), answers, device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64, device=device)
        return replace(read, source=right_padded(prompts, 0, device), source_lengths=lengths)

    @property
    def packed(self) -> bool:
        """Whether rows hold several samples that must not see each other."""
        return self.cu_seqlens is not None

    @property
    def sequence_shape(self) -> tuple[int, int]:
        """(rows, tokens a row) of what reaches megatron-core: packed rows go through in one line."""
        rows, length = self.tokens.shape
        return (1, rows * length) if self.packed else (rows, length)

    def microbatches(self) -> "list[Batch]":
        """Cut the rows into parts of ``micro_batch_size``; raises ParallelismError when a part would not be whole."""
        rows = self.tokens.shape[0]
        size = self.micro_batch_size or rows
        if rows % size:
            raise ParallelismError(
                f"a step of {rows} rows on a data-parallel rank cannot be cut into microbatches of "
                f"micro_batch_size={size}: make global_batch_size a multiple of micro_batch_size x data-parallel ranks."
            )
        return [self._rows(slice(i, i + size)) for i in range(0, rows, size)]

    def count_targets(self) -> Tensor:
        """Return the number of positions that have a target, int64."""
        return (self.labels != IGNORED).sum()

    def in_one_line(self) -> "Batch":
        """Lay the packed rows [b, s] in one line [1, b * s] with one list of boundaries [k]."""
        assert self.cu_seqlens is not None, "only packed rows can lie in one line"
        rows, length = self.tokens.shape
        starts = torch.arange(rows, device=self.cu_seqlens.device).unsqueeze(1) * length
        bounds = torch.unique((self.cu_seqlens + starts).reshape(-1)).to(torch.int32)
        tokens, labels, positions = (t.reshape(1, -1) for t in (self.tokens, self.labels, self.position_ids))
        routes = None if self.routes is None else self.routes.in_one_line(length)
        return replace(self, tokens=tokens, labels=labels, position_ids=positions, cu_seqlens=bounds, routes=routes)

    def learning(self, which: Sequence[bool]) -> "Batch":
        """Keep only those targets, in [b, s] order, that are marked in ``which``."""
        there = self.labels != IGNORED
        marked = torch.zeros_like(there)
        marked[there] = torch.tensor(which, dtype=torch.bool, device=there.device)
        return replace(self, labels=self.labels.masked_fill(~marked, IGNORED))

    def in_multiples_of(self, multiple: int) -> "Batch":
        """Return unpacked rows padded on the right so that ``multiple`` divides their length, and that of sources."""
        source = 0 if self.source is None else self.source.shape[1]
        length, source_length = (size + -size % multiple for size in (self.tokens.shape[1], source))
        return self.padded_to(length, source_length)

    def padded_to(self, length: int, source_length: int = 0) -> "Batch":
        """Return unpacked rows padded on the right to ``length`` tokens, their sources to ``source_length``."""
        behind = (0, length - self.tokens.shape[1])
        wide = Batch.of(F.pad(self.tokens, behind), F.pad(self.labels, behind, value=IGNORED))
        source = None if self.source is None else F.pad(self.source, (0, source_length - self.source.shape[1]))
        return replace(self, tokens=wide.tokens, labels=wide.labels, position_ids=wide.position_ids, source=source)

    def at_positions(self, keep: Tensor) -> "Batch":
        """Return only the positions ``keep`` (indices along s) of every row; a source and boundaries stay whole."""
        tokens, labels, positions = (t.index_select(1, keep) for t in (self.tokens, self.labels, self.position_ids))
        routes = self.routes
        if routes is not None and self.packed:
            routes = routes.each(lambda chosen: chosen.index_select(1, keep))
        return replace(self, tokens=tokens, labels=labels, position_ids=positions, routes=routes)

    def rearranged(self, source: Tensor, cu_seqlens: Tensor) -> "Batch":
        """Return packed rows laid anew, with boundaries ``cu_seqlens`` [b, k].

        ``source`` int64 [b, s'] says where the token of every place stood: at i, or at -1 - i to lose its target.
        """
        at = torch.where(source < 0, -1 - source, source)
        tokens, labels, positions = (t.gather(1, at) for t in (self.tokens, self.labels, self.position_ids))
        labels = labels.masked_fill(source < 0, IGNORED)
        rows, length = self.tokens.shape
        routes = self.routes
        if routes is not None:
            routes = routes.each(lambda chosen: chosen.expand(rows, length).gather(1, at))
        return replace(self, tokens=tokens, labels=labels, position_ids=positions, cu_seqlens=cu_seqlens, routes=routes)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on ``device``."""
        return self._each(lambda tensor: tensor.to(device))

    def _rows(self, chosen: slice) -> "Batch":
        return self._each(lambda tensor: tensor[chosen])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            tokens=change(self.tokens),
            labels=change(self.labels),
            position_ids=change(self.position_ids),
            cu_seqlens=None if self.cu_seqlens is None else change(self.cu_seqlens),
            rows=None if self.rows is None else change(self.rows),
            source=None if self.source is None else change(self.source),
            source_lengths=None if self.source_lengths is None else change(self.source_lengths),
            routes=None if self.routes is None else self.routes.each(change),
        )


@dataclass
class Questions:
    """Prompts to answer: token ids, the question in words, the right answer where it is known, the dataset row.

    ``ways``: the adapters that are to answer each; empty: all of them answer every prompt.
    """

    prompts: Sequence[Sequence[int]]
    inputs: Sequence[str]
    outputs: Sequence[str | None]
    rows: Sequence[int] = ()
    ways: Sequence[Way] = ()

    def chosen(self, numbers: Sequence[int]) -> "Questions":
        """Return the questions with these numbers."""

        def of(values: Sequence[T]) -> list[T]:
            return [values[number] for number in numbers] if values else []

        return Questions(of(self.prompts), of(self.inputs), of(self.outputs), of(self.rows), of(self.ways))

    def to(self, device: torch.device | str) -> "Questions":
        """Return the questions themselves: they hold no tensor."""
        return self
