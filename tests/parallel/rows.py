"""The data of the matrix: steps of random rows with prompts in front and very different numbers of answer tokens."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from graftwork import parallel
from graftwork.batch import IGNORED, Batch
from graftwork.routes import Routes
from tests.parallel.models import prompt_of

LENGTH, ROWS, MICRO, STEPS = 16, 8, 2, 2
SECOND = 9
"""Where the second sample of a packed row starts."""


class Rows(LightningDataModule):
    """Training batches and one to validate, cut over the data-parallel ranks."""

    global_batch_size, micro_batch_size = ROWS, MICRO

    def __init__(self, packed: bool = False, routed: bool = False, steps: int = STEPS) -> None:
        super().__init__()
        self.packed, self.routed, self.steps = packed, routed, steps

    def train_dataloader(self) -> DataLoader:
        """Return the steps of an epoch."""
        return DataLoader([self._mine(step) for step in range(self.steps)], batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Return one batch."""
        return DataLoader([self._mine(100)], batch_size=None)

    def _mine(self, step: int) -> Batch:
        model = self.trainer.lightning_module
        batch = global_batch(model, step, self.packed)
        return mine(routed(model, batch, step) if self.routed else batch)


def mine(batch: Batch) -> Batch:
    """Return this data-parallel rank's rows."""
    rank, size = parallel.dp_rank(), parallel.dp_size()
    return batch._each(lambda tensor: tensor[rank::size].contiguous())


def routed(model: Any, batch: Batch, step: int) -> Batch:
    """Send the samples one after another to each adapter alone, to all of them, and to none.

    What trains the base's own tensors acts on every row.
    """
    always = frozenset(name for name, tensors in model.stack.lent.items() if tensors)
    ways = (*(always | {name} for name in model.adapters if name not in always), None, always)
    starts = samples(batch.packed)
    numbers = (torch.arange(ROWS * len(starts)) + step).reshape(ROWS, -1) % len(ways)
    lengths = torch.tensor([*starts[1:], LENGTH]) - torch.tensor(starts)
    chosen = numbers.repeat_interleave(lengths, 1) if batch.packed else numbers
    return replace(batch, routes=Routes(ways, chosen))


def global_batch(model: Any, step: int, packed: bool = False) -> Batch:
    """Return all rows of one step; in the second step a microbatch, and every second row, has no answer at all."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(model.shape.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    positions = torch.arange(LENGTH).expand(ROWS, -1).clone()
    batch = Batch(ids[:, :-1].clone(), ids[:, 1:].clone(), positions, micro_batch_size=MICRO)
    if model.seq2seq:
        batch = _with_source(model, batch, generator)
    for place, start in enumerate(samples(packed)):
        for row in range(ROWS):
            _put_prompt(batch, row, start, prompt_of(model, row + place))
    for row in range(ROWS):
        batch.labels[row, : int(torch.randint(LENGTH - 1, (), generator=generator))] = IGNORED
    if step == 1:
        batch.labels[1::2] = IGNORED
        batch.labels[:MICRO] = IGNORED
    if packed:
        batch.cu_seqlens = torch.tensor([*samples(packed), LENGTH], dtype=torch.int32).repeat(ROWS, 1)
    return batch


def samples(packed: bool) -> list[int]:
    """Return where the samples of a row start."""
    return [0, SECOND] if packed else [0]


def _with_source(model: Any, batch: Batch, generator: torch.Generator) -> Batch:
    """Give the encoder rows of different lengths to read; neither side is a multiple of two ranks."""
    source = torch.randint(model.shape.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 2, (ROWS,), generator=generator)
    return replace(batch.at_positions(torch.arange(LENGTH - 1)), source=source, source_lengths=lengths)


def _put_prompt(batch: Batch, row: int, start: int, prompt: list[int]) -> None:
    end = start + len(prompt)
    if batch.source is not None:
        batch.source[row, start:end] = torch.tensor(prompt, dtype=torch.long)
        return
    batch.tokens[row, start:end] = torch.tensor(prompt, dtype=torch.long)
    batch.labels[row, max(start - 1, 0) : max(start, end - 1)] = IGNORED  # never predict across samples, or a prompt
    batch.position_ids[row, start:] = torch.arange(LENGTH - start)
