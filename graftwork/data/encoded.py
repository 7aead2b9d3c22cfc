"""The rows of a file as columns of tokens, some at a time, and a report of what became of them."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Optional

from graftwork.data.cache import Columns, Report
from graftwork.data.encoder import Placed, RowEncoder
from graftwork.data.files import read_rows
from graftwork.data.place import Place
from graftwork.data.row_layout import in_one_layout, layout_of
from graftwork.data.schema import parse_row
from graftwork.data.sequence import Sequence
from graftwork.data.workers import mapped, processes
from graftwork.errors import quoted
from graftwork.virtual_tokens import VIRTUAL_BASE

CHUNK = 1000
LARGE = 16 * 2**20
"""Bytes of a file from which on its rows are encoded by several processes: starting these takes a few seconds."""
MOST_NAMED = 20
"""Most unread fields that a report names."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file that follow each other: their numbers, and each as it was read with its place.

    ``layout``: the name of the one that they are said to have, None where their columns tell it.
    """

    rows: list[int]
    read: list[tuple[Place, object]]
    layout: Optional[str] = None

    def placed(self, answered: bool) -> list[Placed]:
        """Return the rows, checked."""
        return [(place, parse_row(raw, place, answered=answered, layout=self.layout)) for place, raw in self.read]

    @property
    def told(self) -> str:
        """The rows' layout in words."""
        place, raw = self.read[0]
        return str(layout_of(raw, place, self.layout)) if isinstance(raw, dict) else ""

    @property
    def shares(self) -> list[float]:
        """Each row's share."""
        return [share(raw) for _, raw in self.read]


@dataclass
class Tally:
    """What became of some rows; the fields are those of ``Report``."""

    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    largest_id: int = 0
    longest: int = 0
    adapters: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    layout: str = ""

    def count(self, sequences: list[Sequence]) -> None:
        """Count the rows that were kept."""
        self.rows += len(sequences)
        self.tokens += sum(len(s) for s in sequences)
        self.answer_tokens += sum(sum(s.loss) for s in sequences)
        self.largest_id = max([self.largest_id, *(i for s in sequences for i in s.tokens if i < VIRTUAL_BASE)])
        self.longest = max([self.longest, *(len(s) for s in sequences)])

    def note(self, encoder: RowEncoder, placed: list[Placed]) -> None:
        """Note the fields that no template reads and the adapters that rows name."""
        for place, row in placed:
            self.unread |= encoder.templates.unread(row, place)
            self.adapters |= row.way or frozenset()

    def add(self, other: "Tally") -> None:
        """Add that of other rows."""
        self.rows += other.rows
        self.dropped += other.dropped
        self.truncated += other.truncated
        self.tokens += other.tokens
        self.answer_tokens += other.answer_tokens
        self.largest_id = max(self.largest_id, other.largest_id)
        self.longest = max(self.longest, other.longest)
        self.adapters |= other.adapters
        self.unread |= other.unread
        self.layout = self.layout or other.layout

    @property
    def names(self) -> Report:
        """The part of the report that names things, and the largest id."""
        unread = [quoted(name, 60, bare=True) for name in sorted(self.unread)[:MOST_NAMED]]
        adapters = sorted(self.adapters)
        return Report(largest_id=self.largest_id, adapters=adapters, unread=unread, layout=self.layout)

    @property
    def counts(self) -> Report:
        """The part of the report that counts."""
        return Report(
            rows=self.rows,
            truncated=self.truncated,
            dropped=self.dropped,
            tokens=self.tokens,
            answer_tokens=self.answer_tokens,
            longest=self.longest,
        )


def learn(path: str, encoder: RowEncoder, layout: Optional[str], report: Report) -> Iterator[Columns]:
    """Yield columns to learn from, a large file's by several processes; raises DataError on a malformed row."""
    whole = Tally()
    report.update(whole.counts | whole.names)
    many = Path(path).stat().st_size >= LARGE
    for columns, part in mapped(partial(_learned, encoder), _chunks(path, layout), processes() if many else 1):
        whole.add(part)
        report.update(whole.counts | whole.names)
        yield columns


def ask(path: str, encoder: RowEncoder, layout: Optional[str], report: Report) -> Iterator[Columns]:
    """Yield columns to ask a model; raises DataError on a malformed row."""
    whole = Tally()
    report.update(whole.names)
    for chunk in _chunks(path, layout):
        placed = chunk.placed(answered=False)
        found = encoder.ask(placed)
        whole.note(encoder, placed)
        whole.layout = chunk.told
        report.update(whole.names)
        yield {
            "tokens": [tokens for tokens, _, _ in found],
            "input": [question for _, question, _ in found],
            "output": [answer for _, _, answer in found],
            "row": chunk.rows,
            "share": chunk.shares,
            "adapters": [_named(row) for row in placed],
        }


def share(raw: object) -> float:
    """A number in [0, 1) that depends on the row's content only."""
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _chunks(path: str, layout: Optional[str]) -> Iterator[Chunk]:
    numbered = enumerate(in_one_layout(read_rows(path), layout))
    while chunk := list(itertools.islice(numbered, CHUNK)):
        yield Chunk([row for row, _ in chunk], [read for _, read in chunk], layout)


def _learned(encoder: RowEncoder, chunk: Chunk) -> tuple[Columns, Tally]:
    placed = chunk.placed(answered=True)
    found = encoder.learn(placed)
    kept = [i for i, (sequence, _) in enumerate(found) if sequence is not None]
    sequences = [sequence for sequence, _ in found if sequence is not None]
    tally = Tally(dropped=len(found) - len(kept), truncated=sum(cut > 0 for _, cut in found), layout=chunk.told)
    tally.count(sequences)
    tally.note(encoder, placed)
    shares = chunk.shares
    columns: Columns = {
        "tokens": [s.tokens for s in sequences],
        "loss": [s.loss for s in sequences],
        "length": [len(s) for s in sequences],
        "row": [chunk.rows[i] for i in kept],
        "number": [placed[i][0].number for i in kept],
        "share": [shares[i] for i in kept],
        "adapters": [_named(placed[i]) for i in kept],
        **({"answer": [len(s) - s.answer_start for s in sequences]} if encoder.seq2seq else {}),
    }
    return columns, tally


def _named(placed: Placed) -> list[str] | None:
    way = placed[1].way
    return None if way is None else sorted(way)
