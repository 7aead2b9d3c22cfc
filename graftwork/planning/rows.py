"""The rows of a run, looked at before it starts: are they there, are they valid, how long are they, do they repeat."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy

from graftwork.data import SFTDataModule
from graftwork.data.encoded import share
from graftwork.data.encoder import Placed, RowEncoder
from graftwork.data.packing import best_fit_decreasing, efficiency
from graftwork.data.place import Place
from graftwork.data.sampler import shuffled
from graftwork.data.schema import Chat, parse_row
from graftwork.data.sequence import Sequence as Tokens
from graftwork.data.sequence import TooLong
from graftwork.data.source import Source, read_source, title
from graftwork.data.tokenizer import Tokenizer, check_ids
from graftwork.errors import ConfigError, DataError
from graftwork.models.shapes import Shape
from graftwork.peft import PEFT
from graftwork.planning.problem import Problem
from graftwork.virtual_tokens import VIRTUAL_BASE, PromptLayout

MOST = 2000
"""Most rows of a file that are read; what is said of a longer one is said of its first rows."""

WASTEFUL = 0.7
"""Share of tokens in a padded batch below which packing is worth a word."""

SHORTEST = 16
"""Upper end of a histogram's first bar; each following one reaches twice as far."""


@dataclass(frozen=True)
class Packing:
    """How full rows are: ``rows`` of ``seq_length`` hold all samples, tokens fill ``efficiency`` (0..1) of them.

    ``padded_efficiency``: that share where each sample has a row, padded to the longest of its global batch.
    """

    rows: int
    efficiency: float
    padded_efficiency: float


@dataclass(frozen=True)
class Lengths:
    """How long rows are, in tokens, virtual ones included, and what the data's lengths make of them.

    ``histogram``: (longest of the bar, rows) before any cut; ``cut``: rows that lose tokens of their prompt; ``unfit``:
    rows whose answer does not fit; ``packing`` is None for sequence-to-sequence models.
    """

    histogram: tuple[tuple[int, int], ...]
    median: int
    longest: int
    cut: int
    unfit: int
    packing: Packing | None


@dataclass(frozen=True)
class Split:
    """What was found in the rows of one split; ``whole``: they are all of its file. ``lengths`` None: not tokenised."""

    name: str
    file: str
    rows: int
    whole: bool
    lengths: Lengths | None = None


@dataclass(frozen=True)
class RowsFindings:
    """What the data files of a run hold; ``notes`` are sentences on what wastes a run without stopping it.

    ``repeated``: validation rows that are training rows too; ``asked_before``: those that share only the question.
    """

    splits: tuple[Split, ...] = ()
    repeated: int = 0
    asked_before: int = 0
    notes: tuple[str, ...] = ()


class Row(NamedTuple):
    """A row as it was read, and checked."""

    raw: object
    placed: Placed


@dataclass
class Reading:
    """The rows of each split that were read, whether they are all, and what stopped the others."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    whole: dict[str, bool] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def look_at_rows(
    data: SFTDataModule,
    tokenizer: Tokenizer | None = None,
    shape: Shape | None = None,
    transforms: Iterable[PEFT] = (),
    seq2seq: bool = False,
    most: int = MOST,
) -> tuple[RowsFindings, list[Problem]]:
    """Return what the first ``most`` rows of every file say, and what would stop a run on them.

    ``tokenizer``: the model's own (None where it is not known; lengths are then not told unless the data name one);
    ``shape``: the model's sizes; ``transforms``: the adapters, whose virtual tokens count. Nothing is written.
    """
    return look_at_reading(read_splits(data, most), data, tokenizer, shape, transforms, seq2seq)


def look_at_reading(
    reading: Reading,
    data: SFTDataModule,
    tokenizer: Tokenizer | None = None,
    shape: Shape | None = None,
    transforms: Iterable[PEFT] = (),
    seq2seq: bool = False,
) -> tuple[RowsFindings, list[Problem]]:
    """Return what ``look_at_rows`` does of rows that were read already."""
    problems, splits = list(reading.problems), []
    encoder = _encoder(data, tokenizer, transforms, seq2seq, problems)
    for name, rows in reading.rows.items():
        split = Split(name, title(data.files[name] or data.files["train"] or ""), len(rows), reading.whole[name])
        if encoder is not None and rows and name != "predict":
            lengths, found = _lengths(split, rows, encoder, data, shape)
            split, problems = replace(split, lengths=lengths), problems + found
        splits.append(split)
    repeated, asked = _repeats(reading.rows.get("train", []), reading.rows.get("validation", []))
    notes = [*_repeat_notes(repeated, asked, splits), *_length_notes(splits, data)]
    return RowsFindings(tuple(splits), repeated, asked, tuple(notes)), problems


def prompt_layout(transforms: Iterable[PEFT]) -> PromptLayout:
    """Return the virtual tokens that a model with these adapters has, in their order."""
    layout = PromptLayout()
    for transform in transforms:
        layout = layout.appended(transform.prompt_slots(layout.size))
    return layout


def read_splits(data: SFTDataModule, most: int) -> Reading:
    """Read the first ``most`` rows of every split and check them."""
    reading = Reading()
    if data.files["train"] is None:
        reading.problems.append(Problem("data.train", "no file to learn from is named; set data.train=FILE."))
    for name, path in data.files.items():
        if path is None:
            continue
        try:
            found = _rows_of(path, most + 1, name != "predict", data.row_layout)
        except DataError as error:
            reading.problems.append(Problem(f"data.{name}", str(error)))
            continue
        reading.rows[name], reading.whole[name] = found[:most], len(found) <= most
    if data.validation_fraction and "train" in reading.rows:
        _hold_out(reading, data.validation_fraction)
    return reading


def _rows_of(source: Source, most: int, answered: bool, layout: str | None) -> list[Row]:
    return [
        Row(raw, (place, parse_row(raw, place, answered=answered, layout=layout)))
        for place, raw in itertools.islice(read_source(source, layout), most)
    ]


def _hold_out(reading: Reading, fraction: float) -> None:
    rows, whole = reading.rows["train"], reading.whole["train"]
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[share(row.raw) < fraction].append(row)
    if whole and not all(parts):
        said = f"it holds out {len(parts[1])} of {len(rows)} rows of the training file; both parts need at least one."
        reading.problems.append(Problem("data.validation_fraction", said))
    reading.rows["train"], reading.rows["validation"] = parts
    reading.whole["validation"] = whole


def _encoder(
    data: SFTDataModule,
    tokenizer: Tokenizer | None,
    transforms: Iterable[PEFT],
    seq2seq: bool,
    problems: list[Problem],
) -> RowEncoder | None:
    if tokenizer is None and data.tokenizer_path is None:
        return None
    try:
        return data.encoder_for(tokenizer, prompt_layout(transforms), seq2seq)
    except (ConfigError, DataError) as error:
        problems.append(Problem("data.tokenizer" if data.tokenizer_path else "data", str(error)))
        return None


def _lengths(
    split: Split, rows: Sequence[Row], encoder: RowEncoder, data: SFTDataModule, shape: Shape | None
) -> tuple[Lengths | None, list[Problem]]:
    """Return the lengths of a split's rows, and what would stop the run on them."""
    placed = [row.placed for row in rows]
    try:
        sequences = encoder.whole(placed)
        whole = [len(sequence) for sequence in sequences]
        cuts = [_cut(encoder, sequence, place) for sequence, (place, _) in zip(sequences, placed)]
        kept = [sequence for sequence, cut in zip(sequences, cuts) if isinstance(cut, int)]
        largest = max((i for sequence in kept for i in sequence.tokens if i < VIRTUAL_BASE), default=0)
        check_ids(largest, shape.vocab_size if shape is not None else None, split.file)
    except (ConfigError, DataError) as error:
        return None, [Problem(f"data.{split.name}", str(error))]
    unfit = [cut for cut in cuts if isinstance(cut, TooLong)]
    lengths = Lengths(
        histogram=_histogram(whole),
        median=int(numpy.median(whole)),
        longest=max(whole),
        cut=sum(cut > 0 for cut in cuts if isinstance(cut, int)),
        unfit=len(unfit),
        packing=_packing([len(sequence) for sequence in kept], data) if kept and not encoder.seq2seq else None,
    )
    return lengths, list(_unfit_problems(unfit, len(rows), encoder.too_long))


def _cut(encoder: RowEncoder, sequence: Tokens, place: Place) -> int | TooLong:
    try:
        return encoder.cut(sequence, place)
    except TooLong as error:
        return error


def _unfit_problems(unfit: Sequence[TooLong], rows: int, too_long: str) -> Iterator[Problem]:
    if unfit and (too_long == "error" or len(unfit) == rows):
        yield Problem(f"data.{unfit[0].option}", f"{len(unfit)} of {rows} rows do not fit; the first: {unfit[0]}")


def _packing(lengths: list[int], data: SFTDataModule) -> Packing:
    bins = best_fit_decreasing(lengths, data.seq_length)
    order, size = shuffled(len(lengths), data.seed, 0).tolist(), data.global_batch_size
    batches = [[lengths[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    return Packing(len(bins), efficiency(lengths, bins, data.seq_length), sum(lengths) / padded)


def _histogram(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    bars = Counter(SHORTEST * 2 ** (-(-length // SHORTEST) - 1).bit_length() for length in lengths)
    first, last = min(bars), max(bars)
    ends = itertools.takewhile(lambda end: end <= last, (first * 2**i for i in itertools.count()))
    return tuple((end, bars[end]) for end in ends)


def _repeats(train: Sequence[Row], validation: Sequence[Row]) -> tuple[int, int]:
    """Return how many validation rows are training rows too, and how many others share a question with one."""
    rows, questions = {digest(row.raw) for row in train}, {_question(row) for row in train}
    repeated = [digest(row.raw) in rows for row in validation]
    asked = [_question(row) in questions for row in validation]
    return sum(repeated), sum(a and not r for a, r in zip(asked, repeated))


def _question(row: Row) -> bytes:
    checked = row.placed[1]
    if isinstance(checked, Chat):
        return digest([checked.task, *(m.model_dump() for m in checked.messages[:-1])])
    return digest([checked.task, {k: v for k, v in checked.fields.items() if k != "output"}])


def digest(value: object) -> bytes:
    """Return what two equal values have in common, and others not."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()


def _repeat_notes(repeated: int, asked: int, splits: Sequence[Split]) -> Iterator[str]:
    read = {split.name: split for split in splits}
    compared = [read[name] for name in ("train", "validation") if name in read]
    count = sum(split.rows for split in compared if split.name == "validation")
    extent = "" if all(split.whole for split in compared) else ", of those that were read"
    if repeated:
        yield f"{repeated} of {count} validation rows are training rows too{extent}: they measure memory, not learning."
    if asked:
        yield f"{asked} of {count} validation rows ask what a training row asks, with another answer{extent}."


def _length_notes(splits: Sequence[Split], data: SFTDataModule) -> Iterator[str]:
    for split in splits:
        if (found := split.lengths) is None:
            continue
        if found.cut:
            yield f"{found.cut} of {split.rows} {split.name} rows lose the beginning of their prompt to seq_length."
        if found.unfit and found.unfit < split.rows:
            yield f"{found.unfit} of {split.rows} {split.name} rows have an answer that does not fit."
        packing = found.packing
        if split.name == "train" and not data.packing and packing and packing.padded_efficiency < WASTEFUL:
            yield (
                f"{1 - packing.padded_efficiency:.0%} of the tokens of a training batch are padding; data.packing=True "
                f"puts {(split.rows - found.unfit) / packing.rows:.1f} rows into one of {data.seq_length} tokens, "
                f"{1 - packing.efficiency:.0%} of them padding."
            )
