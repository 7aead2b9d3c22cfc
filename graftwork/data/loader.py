"""Iterables of step batches for one data-parallel rank.

They are no torch ``DataLoader``: Lightning then neither replaces the sampler nor shards a second time.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from graftwork.batch import Batch, Questions
from graftwork.data.collate import Collator, PairCollator, round_up
from graftwork.data.rows import LearnedRows
from graftwork.data.sampler import FILL, RowStream
from graftwork.data.surroundings import Topology

if TYPE_CHECKING:
    from datasets import Dataset as Table

Built = TypeVar("Built")
"""What a loader hands out: a Batch, or Questions."""


class StepBuilder:
    """Builds this rank's part of a global batch: rows ``rank::world_size``.

    ``bins`` lists the samples of each packed row; None = one sample a row, padded to the longest row of the *global*
    batch, so that all ranks have one length.
    """

    def __init__(
        self,
        rows: LearnedRows,
        bins: list[list[int]] | None,
        collate: Collator | PairCollator,
        seq_length: int,
        place: Topology,
    ) -> None:
        self.rows = rows
        self.bins = bins
        self.collate = collate
        self.seq_length = seq_length
        self.place = place

    def __len__(self) -> int:
        return len(self.rows) if self.bins is None else len(self.bins)

    def __call__(self, chosen: list[int]) -> Batch:
        mine = [self._members(row) for row in chosen[self.place.rank :: self.place.world_size]]
        samples = iter(self.rows.samples([i for members in mine for i in members]))
        return self.collate([list(itertools.islice(samples, len(m))) for m in mine], *self._lengths(chosen))

    def _members(self, row: int) -> list[int]:
        if row == FILL:
            return []
        return [row] if self.bins is None else self.bins[row]

    def _lengths(self, chosen: list[int]) -> tuple[int, int]:
        """How long rows and their sources are on every rank (0: there are no sources)."""
        if self.bins is not None:
            return self.seq_length, 0
        real = [row for row in chosen if row != FILL]
        whole, answers = self.rows.lengths[real], self.rows.answers[real]
        parts = (answers, whole - answers) if isinstance(self.collate, PairCollator) else (whole, answers)
        length, source = (round_up(int(part.max()), self.place.multiple) for part in parts)
        return length, source


class TrainLoader:
    """One Lightning epoch a pass: as many steps as show every row, going on where the stream stands."""

    def __init__(self, stream: RowStream, build: StepBuilder, num_workers: int = 0) -> None:
        self.stream = stream
        self.build = build
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        stream = self.stream
        if stream.overfit:
            stream.consumed_samples = 0
        start, step = stream.consumed_samples, stream.global_batch_size
        plans = (stream.batch(start + i * step) for i in range(len(stream)))
        for batch in ordered_map(self.build, plans, self.num_workers):
            # Counted when handed out, not when a worker prepares it: a checkpoint then holds what was trained on.
            stream.consumed_samples += step
            yield batch


class ListLoader(Generic[Built]):
    """The same batches on every pass: validation, test and prediction."""

    def __init__(self, build: Callable[[list[int]], Built], plans: list[list[int]], num_workers: int = 0) -> None:
        self.build = build
        self.plans = plans
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Built]:
        return ordered_map(self.build, self.plans, self.num_workers)


class QuestionBuilder:
    """Builds the questions of chosen rows of a table of prompts."""

    def __init__(self, table: "Table") -> None:
        self.table = table

    def __call__(self, chosen: list[int]) -> Questions:
        found = self.table[chosen]
        return Questions(
            prompts=list(found["tokens"]),
            inputs=list(found["input"]),
            outputs=list(found["output"]),
            rows=list(found["row"]),
            ways=[None if names is None else frozenset(names) for names in found["adapters"]],
        )


class _Built(Dataset[Built]):
    def __init__(self, build: Callable[[list[int]], Built], plans: list[list[int]]) -> None:
        self.build = build
        self.plans = plans

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> Built:
        return self.build(self.plans[index])


def ordered_map(build: Callable[[list[int]], Built], plans: Iterable[list[int]], num_workers: int) -> Iterator[Built]:
    """``map(build, plans)``, in ``num_workers`` processes where asked."""
    if num_workers == 0:
        return map(build, plans)
    # A generator of its own: torch's loader would draw its workers' seed from the global one and shift the dropout.
    own = torch.Generator().manual_seed(0)
    whole = _Built(build, list(plans))
    made: Iterator[Built] = iter(DataLoader(whole, batch_size=None, num_workers=num_workers, generator=own))
    return made
