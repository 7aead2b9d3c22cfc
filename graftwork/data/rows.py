"""Tokenised rows of one file: built once through the cache, read by number."""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import pyarrow

from graftwork.batch import IGNORED
from graftwork.data.cache import Report, cache_key, cached_table
from graftwork.data.encoded import ask, learn
from graftwork.data.encoder import RowEncoder
from graftwork.data.files import content_hash
from graftwork.data.tokenizer import fingerprint
from graftwork.errors import DataError, quoted, suggest
from graftwork.ways import Way

if TYPE_CHECKING:
    from datasets import Dataset

_NEEDED = frozenset({"unread", "largest_id", "adapters"})
"""What the report of an entry must say; those of an earlier version do not."""

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
    """

    def __init__(self, table: "Dataset", chosen: numpy.ndarray | None = None) -> None:
        count = table.num_rows
        self.chosen = numpy.arange(count) if chosen is None else chosen
        self.lengths: numpy.ndarray = table.data.column("length").to_numpy()[self.chosen]
        self.answers: numpy.ndarray = numpy.zeros_like(self.lengths)
        if "answer" in table.column_names:
            self.answers = table.data.column("answer").to_numpy()[self.chosen]
        self._table = table
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
        return LearnedRows(self._table, self.chosen[chosen])

    def number_of(self, row: int) -> int:
        """1-based line (or Parquet row) of dataset row ``row``."""
        at = numpy.flatnonzero(self._table.data.column("row").to_numpy() == row)
        if not len(at):
            raise DataError(f"there is no dataset row {row}; rows count from 0, dropped ones are missing.")
        return int(self._table.data.column("number")[int(at[0])].as_py())


def _labels(tokens: numpy.ndarray, learned: numpy.ndarray) -> numpy.ndarray:
    labels = numpy.full_like(tokens, IGNORED)
    labels[:-1] = numpy.where(learned[1:], tokens[1:], IGNORED)
    return labels


def learned_rows(path: str, encoder: RowEncoder, root: Path) -> tuple[LearnedRows, Report]:
    """Tokenise ``path`` to learn from, or find it in the cache; raises DataError on a malformed row."""
    key = _key("learn", path, encoder)
    schema = PAIRS if encoder.seq2seq else LEARNED
    table, report = cached_table(root, key, schema, partial(learn, path, encoder), needed=_NEEDED)
    if len(table) == 0:
        raise DataError(f"every row of {path!r} was dropped as longer than seq_length={encoder.seq_length}.")
    return LearnedRows(table), {"file": path, **report}


def asked_rows(path: str, encoder: RowEncoder, root: Path) -> "Dataset":
    """Tokenised prompts of ``path`` as a ``datasets.Dataset`` with tokens, input, output and row."""
    key = _key("ask", path, encoder)
    return cached_table(root, key, ASKED, partial(ask, path, encoder), needed=_NEEDED)[0]


def check_adapters(named: list[str], attached: list[str] | None, path: str) -> None:
    """Raise DataError when rows of ``path`` are sent to an adapter that a model (None: no model) does not have."""
    for name in named if attached is not None else ():
        if name not in (attached or ()):
            valid = suggest(name, attached or ()) if attached else "the model has no adapters."
            raise DataError(f"rows of {quoted(path)} are sent to the adapter {quoted(name)}; {valid}")


def _key(purpose: str, path: str, encoder: RowEncoder) -> str:
    prompt, answer = encoder.templates.key
    return cache_key(
        purpose=purpose,
        kind=Path(path).suffix,
        content=content_hash(path),
        tokenizer=fingerprint(encoder.tokenizer),
        prompt=prompt,
        answer=answer,
        layout=encoder.layout.slots,
        seq_length=encoder.seq_length,
        bos_eos=[encoder.text.add_bos, encoder.text.add_eos],
        too_long=encoder.too_long,
        **({"answer_length": encoder.answer_length} if encoder.seq2seq else {}),
    )
