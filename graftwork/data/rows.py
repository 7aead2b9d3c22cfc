"""Tokenised rows of files: built once through the cache, a file at a time, read by number."""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import numpy
import pyarrow

from graftwork.batch import IGNORED
from graftwork.data.cache import Columns, Report, cache_key, cached_table, joined
from graftwork.data.compressed import ending
from graftwork.data.encoded import ask, learn
from graftwork.data.encoder import RowEncoder
from graftwork.data.files import content_hash, unit
from graftwork.data.place import Place
from graftwork.data.source import Source, source_files, title
from graftwork.data.tokenizer import fingerprint
from graftwork.errors import DataError, quoted, suggest
from graftwork.ways import Way

if TYPE_CHECKING:
    from datasets import Dataset

_NEEDED = frozenset({"unread", "largest_id", "adapters", "layout"})
"""What the report of an entry must say; those of an earlier version do not."""

Make = Callable[[str, RowEncoder, Optional[str], Report], Iterator[Columns]]
"""Yields the rows of a file in a layout, and fills in its report."""

LEARNED = pyarrow.schema(
    [
        ("tokens", pyarrow.list_(pyarrow.int32())),  # virtual ids start at 2**30: they fit
        ("loss", pyarrow.list_(pyarrow.bool_())),
        ("length", pyarrow.int32()),
        ("row", pyarrow.int64()),
        ("number", pyarrow.int64()),
        ("share", pyarrow.float64()),
        ("adapters", pyarrow.list_(pyarrow.string())),  # null: all of them
    ]
)
PAIRS = LEARNED.append(pyarrow.field("answer", pyarrow.int32()))
"""For sequence-to-sequence models: the last ``answer`` tokens are the decoder's, those before them the encoder's."""

ASKED = pyarrow.schema(
    [
        ("tokens", pyarrow.list_(pyarrow.int32())),
        ("input", pyarrow.string()),
        ("output", pyarrow.string()),
        ("row", pyarrow.int64()),
        ("share", pyarrow.float64()),
        ("adapters", pyarrow.list_(pyarrow.string())),
    ]
)


@dataclass(frozen=True)
class Sample:
    """One tokenised row: ``tokens`` and ``labels`` int64 [n]; ``labels[t]`` is the token after t, or IGNORED.

    For a sequence-to-sequence model the last ``answer`` tokens are the decoder's. ``way``: the adapters that act on it.
    """

    tokens: numpy.ndarray
    labels: numpy.ndarray
    row: int
    answer: int = 0
    way: Way = None


class LearnedRows:
    """Rows to learn from; ``lengths`` int32 [len(self)] counts tokens, virtual ones included.

    ``answers`` int32 [len(self)] counts those that a decoder gives; zeros where one sequence holds prompt and answer.
    ``files`` in turn; ``ends``: rows of the table up to the end of each; ``firsts``: dataset rows before each, those
    that were dropped included.
    """

    def __init__(
        self,
        table: "Dataset",
        chosen: numpy.ndarray | None = None,
        *,
        files: Sequence[str],
        ends: Sequence[int],
        firsts: Sequence[int],
    ) -> None:
        count = table.num_rows
        self.chosen = numpy.arange(count) if chosen is None else chosen
        self.lengths: numpy.ndarray = table.data.column("length").to_numpy()[self.chosen]
        self.answers: numpy.ndarray = numpy.zeros_like(self.lengths)
        if "answer" in table.column_names:
            self.answers = table.data.column("answer").to_numpy()[self.chosen]
        self._table = table
        self._files, self._ends, self._firsts = files, ends, firsts
        self._reader = table.with_format("arrow", columns=["tokens", "loss", "row", "adapters"])

    def __len__(self) -> int:
        return len(self.chosen)

    def samples(self, indices: list[int]) -> list[Sample]:
        """The rows with these numbers, in one read."""
        if not indices:
            return []
        found = self._reader[self.chosen[indices].tolist()]
        tokens, loss = (found[name].combine_chunks() for name in ("tokens", "loss"))
        edges = numpy.cumsum([0, *self.lengths[indices]]).tolist()
        ids = tokens.flatten().to_numpy(zero_copy_only=False).astype(numpy.int64)
        learned = loss.flatten().to_numpy(zero_copy_only=False)
        return [
            Sample(ids[a:b], _labels(ids[a:b], learned[a:b]), row, answer, None if names is None else frozenset(names))
            for (a, b), row, answer, names in zip(
                itertools.pairwise(edges),
                found["row"].to_pylist(),
                self.answers[indices].tolist(),
                found["adapters"].to_pylist(),
            )
        ]

    @property
    def shares(self) -> numpy.ndarray:
        """A number in [0, 1) per row, float64, by the row's content: equal rows fall on one side of any split."""
        shares: numpy.ndarray = self._table.data.column("share").to_numpy()
        return shares[self.chosen]

    def take(self, chosen: numpy.ndarray) -> "LearnedRows":
        """Only the rows with these numbers."""
        return LearnedRows(self._table, self.chosen[chosen], files=self._files, ends=self._ends, firsts=self._firsts)

    def place_of(self, row: int) -> Place:
        """Where dataset row ``row`` stands; raises DataError for one that is not there."""
        at = numpy.flatnonzero(self._table.data.column("row").to_numpy() == row)
        if not len(at):
            raise DataError(f"there is no dataset row {row}; rows count from 0, dropped ones are missing.")
        file = self._files[bisect.bisect_right(self._firsts, row) - 1]
        return Place(file, unit(file), int(self._table.data.column("number")[int(at[0])].as_py()))

    def counts(self, files: Sequence[int]) -> list[int]:
        """How many rows come of each part, where part i is the next ``files[i]`` files."""
        ends = [self._ends[end - 1] for end in itertools.accumulate(files)]
        found: list[int] = numpy.diff(numpy.searchsorted(self.chosen, [0, *ends])).tolist()
        return found


def _labels(tokens: numpy.ndarray, learned: numpy.ndarray) -> numpy.ndarray:
    labels = numpy.full_like(tokens, IGNORED)
    labels[:-1] = numpy.where(learned[1:], tokens[1:], IGNORED)
    return labels


def learned_rows(
    source: Source, encoder: RowEncoder, root: Path, layout: Optional[str] = None
) -> tuple[LearnedRows, Report]:
    """Tokenise the files of ``source`` to learn from, or find them in the cache; raises DataError on a malformed row.

    ``layout``: the name of the one that rows are said to have; None: as their columns tell.
    """
    schema, files = PAIRS if encoder.seq2seq else LEARNED, source_files(source)
    found = [_cached(root, "learn", schema, learn, file, encoder, layout) for file in files]
    report = joined([report for _, report in found])
    if report["rows"] == 0:
        raise DataError(f"every row of {title(source)!r} was dropped as longer than seq_length={encoder.seq_length}.")
    ends = list(itertools.accumulate(len(table) for table, _ in found))
    firsts = [0, *itertools.accumulate(report["rows"] + report["dropped"] for _, report in found)][:-1]
    table = _one_table([table for table, _ in found], firsts)
    return LearnedRows(table, files=files, ends=ends, firsts=firsts), {"file": title(source), **report}


def asked_rows(source: Source, encoder: RowEncoder, root: Path, layout: Optional[str] = None) -> "Dataset":
    """Tokenised prompts of ``source`` as a ``datasets.Dataset`` with tokens, input, output and row."""
    tables = [_cached(root, "ask", ASKED, ask, file, encoder, layout)[0] for file in source_files(source)]
    return _one_table(tables, [0, *itertools.accumulate(map(len, tables))][:-1])


def _cached(
    root: Path, purpose: str, schema: pyarrow.Schema, make: Make, file: str, encoder: RowEncoder, layout: Optional[str]
) -> tuple["Dataset", Report]:
    key = _key(purpose, file, encoder, layout)
    return cached_table(root, key, schema, partial(make, file, encoder, layout), needed=_NEEDED)


def _one_table(tables: list["Dataset"], firsts: list[int]) -> "Dataset":
    """Return the rows of several files as those of one, numbered from each file's first on."""
    if len(tables) == 1:
        return tables[0]
    from datasets import concatenate_datasets

    whole = concatenate_datasets(tables)
    rows = whole.data.column("row").to_numpy() + numpy.repeat(firsts, [len(table) for table in tables])
    return whole.remove_columns("row").add_column("row", rows)


def check_adapters(named: list[str], attached: list[str] | None, path: str) -> None:
    """Raise DataError when rows of ``path`` are sent to an adapter that a model (None: no model) does not have."""
    for name in named if attached is not None else ():
        if name not in (attached or ()):
            valid = suggest(name, attached or ()) if attached else "the model has no adapters."
            raise DataError(f"rows of {quoted(path)} are sent to the adapter {quoted(name)}; {valid}")


def _key(purpose: str, path: str, encoder: RowEncoder, layout: Optional[str]) -> str:
    prompt, answer = encoder.templates.key
    return cache_key(
        purpose=purpose,
        kind=ending(path),
        content=content_hash(path),
        tokenizer=fingerprint(encoder.tokenizer),
        prompt=prompt,
        answer=answer,
        layout=encoder.layout.slots,
        seq_length=encoder.seq_length,
        bos_eos=[encoder.text.add_bos, encoder.text.add_eos],
        too_long=encoder.too_long,
        **({"answer_length": encoder.answer_length} if encoder.seq2seq else {}),
        **({"row_layout": layout} if layout is not None else {}),
    )
