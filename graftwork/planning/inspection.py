"""Data files looked at by themselves: layout, lengths, what a length cuts, repeats, and rows as they are learned."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from graftwork.data import SFTDataModule
from graftwork.data.encoder import RowEncoder
from graftwork.data.row_layout import layout_of
from graftwork.data.sequence import Sequence as Tokens
from graftwork.data.tokenizer import Tokenizer
from graftwork.errors import DataError
from graftwork.models.shapes import Shape
from graftwork.peft import PEFT
from graftwork.planning.problem import Problem
from graftwork.planning.rows import Row, RowsFindings, digest, look_at_reading, prompt_layout, read_splits
from graftwork.virtual_tokens import VIRTUAL_BASE

MOST = 100_000
"""Most rows of a split that are looked at."""

SHOWN = 3
"""Rows that are shown as they are learned."""


@dataclass(frozen=True)
class Repeats:
    """How many rows of ``split`` stand in ``other`` too; with ``other`` the same: how many stand there before."""

    split: str
    other: str
    rows: int


@dataclass(frozen=True)
class Shown:
    """A row as it is learned: where it stands, and its text in stretches that are (True) or are not learned."""

    place: str
    tokens: int
    stretches: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Inspection:
    """What was found; ``layouts``: what the rows of each split hold, in words."""

    findings: RowsFindings
    layouts: dict[str, str]
    repeats: tuple[Repeats, ...]
    shown: tuple[Shown, ...]
    seq_length: int
    problems: tuple[Problem, ...]


def inspect(
    data: SFTDataModule,
    tokenizer: Tokenizer | None,
    shape: Shape | None = None,
    transforms: Sequence[PEFT] = (),
    seq2seq: bool = False,
    most: int = MOST,
    shown: int = SHOWN,
) -> Inspection:
    """Look at the first ``most`` rows of every split, encoded for a model with these adapters; nothing is written.

    ``tokenizer``: the model's own, None where the data name one. Raises DataError for files and rows that cannot be
    read, ConfigError for templates that do not fit.
    """
    reading = read_splits(data, most)
    if reading.problems:
        raise DataError(reading.problems[0].message)
    findings, problems = look_at_reading(reading, data, tokenizer, shape, transforms, seq2seq)
    encoder = data.encoder_for(tokenizer, prompt_layout(transforms), seq2seq)
    return Inspection(
        findings=findings,
        layouts={name: _layouts(rows, data.row_layout) for name, rows in reading.rows.items()},
        repeats=tuple(_repeats(reading.rows)),
        shown=tuple(_shown(encoder, reading.rows["train"][:shown])),
        seq_length=data.seq_length,
        problems=tuple(problems),
    )


def _layouts(rows: Iterable[Row], layout: str | None) -> str:
    """Name the layouts of a split's files by the first row of each."""
    firsts = {row.placed[0].file: row for row in reversed(list(rows))}
    found = [layout_of(row.raw, row.placed[0], layout) for row in firsts.values() if isinstance(row.raw, dict)]
    return " and ".join(dict.fromkeys(str(one) for one in reversed(found)))


def _repeats(rows: dict[str, list[Row]]) -> Iterator[Repeats]:
    digests = {name: [digest(row.raw) for row in of_split] for name, of_split in rows.items()}
    for name, found in digests.items():
        yield Repeats(name, name, len(found) - len(set(found)))
    for first, second in itertools.combinations(digests, 2):
        known = set(digests[first])
        yield Repeats(second, first, sum(one in known for one in digests[second]))


def _shown(encoder: RowEncoder, rows: Sequence[Row]) -> Iterator[Shown]:
    for row in rows:
        place = row.placed[0]
        sequence = encoder.whole([row.placed])[0]
        yield Shown(str(place), len(sequence), tuple(_stretches(encoder, sequence)))


def _stretches(encoder: RowEncoder, sequence: Tokens) -> Iterator[tuple[str, bool]]:
    """Yield text and whether it is learned; virtual tokens are counted."""
    marked = zip(sequence.tokens, sequence.loss)
    for (virtual, loss), group in itertools.groupby(marked, lambda pair: (pair[0] >= VIRTUAL_BASE, pair[1])):
        ids = [token for token, _ in group]
        yield f"<{len(ids)} virtual>" if virtual else encoder.tokenizer.decode(ids), loss
