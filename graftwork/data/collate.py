"""Samples to the tensors of one optimizer step."""

import itertools
import math
from dataclasses import replace

import torch

from graftwork.batch import IGNORED, Batch
from graftwork.data.rows import Sample
from graftwork.routes import Routes


class Collator:
    """Lays each bin of samples into one row, right-padded; a padded batch is one of bins that hold one sample.

    An empty bin makes a row that is ignored altogether (it evens out the ranks' microbatches).
    """

    def __init__(self, pad: int, micro_batch_size: int, packed: bool) -> None:
        self.pad = pad
        self.micro_batch_size = micro_batch_size
        self.packed = packed

    def __call__(self, bins: list[list[Sample]], length: int, source_length: int = 0) -> Batch:
        """Return the batch of ``len(bins)`` rows of ``length`` tokens, with ``cu_seqlens`` only where packed."""
        shape = (len(bins), length)
        batch = Batch(
            tokens=torch.full(shape, self.pad, dtype=torch.int64),
            labels=torch.full(shape, IGNORED, dtype=torch.int64),
            position_ids=torch.zeros(shape, dtype=torch.int64),
            rows=_rectangle([[s.row for s in samples] for samples in bins], -1, torch.int64),
            micro_batch_size=self.micro_batch_size,
        )
        edges = [_lay(batch, i, samples) for i, samples in enumerate(bins)]
        if self.packed:
            batch.cu_seqlens = _rectangle(edges, length, torch.int32)
        batch.routes = _routes(bins, length if self.packed else None)
        return batch


class PairCollator:
    """Gives the prompt of each bin's one sample to an encoder and its answer to a decoder, which begins with ``start``.

    An empty bin makes a row that is ignored altogether; its encoder reads a single token, for it cannot read none.
    """

    def __init__(self, start: int, micro_batch_size: int) -> None:
        self.start = start
        self.micro_batch_size = micro_batch_size

    def __call__(self, bins: list[list[Sample]], length: int, source_length: int) -> Batch:
        """Return the batch of ``len(bins)`` rows of ``length`` tokens, their sources of ``source_length``."""
        pairs = [_pair(samples) for samples in bins]
        laid = Batch.answering([prompt for prompt, _ in pairs], [answer for _, answer in pairs], self.start, "cpu")
        return replace(
            laid.padded_to(length, source_length),
            rows=_rectangle([[s.row for s in samples] for samples in bins], -1, torch.int64),
            micro_batch_size=self.micro_batch_size,
            routes=_routes(bins),
        )


def _routes(bins: list[list[Sample]], packed_length: int | None = None) -> Routes | None:
    """Return the ways of the samples, of rows or, packed, of their tokens; None where every adapter acts everywhere."""
    ways = (None, *dict.fromkeys(s.way for samples in bins for s in samples if s.way is not None))
    if len(ways) == 1:
        return None
    chosen = torch.zeros(len(bins), packed_length or 1, dtype=torch.int64)
    for row, samples in zip(chosen, bins):
        at = 0
        for sample in samples:
            stop = at + len(sample.tokens) if packed_length else 1
            row[at:stop], at = ways.index(sample.way), stop
    return Routes(ways, chosen)


def _pair(samples: list[Sample]) -> tuple[list[int], list[int]]:
    if not samples:
        return [0], []
    (sample,) = samples
    at = len(sample.tokens) - sample.answer
    return sample.tokens[:at].tolist(), sample.tokens[at:].tolist()


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``length``."""
    return math.ceil(length / multiple) * multiple


def _lay(batch: Batch, row: int, samples: list[Sample]) -> list[int]:
    """Write one row and return the boundaries of its segments; the padded tail is a segment of its own."""
    length = batch.tokens.shape[1]
    edges = [0]
    for sample in samples:
        span = slice(edges[-1], edges[-1] + len(sample.tokens))
        batch.tokens[row, span] = torch.from_numpy(sample.tokens)
        batch.labels[row, span] = torch.from_numpy(sample.labels)
        edges.append(span.stop)
    if edges[-1] < length:
        edges.append(length)
    # Positions restart in the tail too: it never reaches beyond the model's position table.
    for start, stop in itertools.pairwise(edges):
        batch.position_ids[row, start:stop] = torch.arange(stop - start)
    return edges


def _rectangle(lists: list[list[int]], fill: int, dtype: torch.dtype) -> torch.Tensor:
    width = max(1, *(len(items) for items in lists))
    return torch.tensor([items + [fill] * (width - len(items)) for items in lists], dtype=dtype)
