"""Rows with known answers, and how they become token sequences for one model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypedDict

from graftwork.data import PROMPT_FORMAT, RowEncoder, SFTDataModule
from graftwork.data.place import Place
from graftwork.data.schema import Chat, Prompt, parse_row
from graftwork.data.sequence import Sequence
from graftwork.data.source import read_source
from graftwork.data.template import Template, check_templates
from graftwork.errors import ConfigError, DataError
from graftwork.models import Model
from graftwork.ways import Way

MOST_LABELS = 20
"""More distinct answers than this are not taken for a closed set."""

Placed = tuple[Place, Prompt | Chat]
Asked = tuple[list[int], str, str | None]


@dataclass(frozen=True)
class Kind:
    """What rows have in common that are judged together: their task, and the adapters that act on them."""

    task: str | None = None
    way: Way = None

    @property
    def who(self) -> str:
        """The adapters in words."""
        return "all" if self.way is None else "+".join(sorted(self.way)) or "base"


class Templates(TypedDict, total=False):
    """How rows of a file are put to a model; what is left out is as the model's adapters were trained."""

    prompt_template: Template | None
    answer_template: Template | None


@dataclass(frozen=True)
class Examples:
    """Checked rows and what makes the encoder they need, for a model as it is when it is asked: adapters may change.

    ``way``: the adapters that act on all of these rows, where they have one in common. A template that is not given is
    the one that the model's adapters were trained with; without any it is ``{input}`` and `` {output}``.
    """

    rows: list[Placed]
    make: Callable[[Model, Way], RowEncoder]
    way: Way = None

    def encoder(self, model: Model) -> RowEncoder:
        """Return what turns the rows into tokens of ``model``."""
        return self.make(model, self.way)

    @classmethod
    def from_file(
        cls,
        path: str,
        prompt_template: Template | None = None,
        answer_template: Template | None = None,
        limit: int | None = None,
        answered: bool = True,
        row_layout: str | None = None,
    ) -> "Examples":
        """Read at most ``limit`` rows of a file or directory; raises DataError naming file, line and field."""
        rows = list(read_source(path, row_layout))
        return cls(_parsed(rows, limit, answered, row_layout), _encoder(prompt_template, answer_template))

    @classmethod
    def from_prompts(
        cls, prompts: list[str], prompt_template: Template | None = None, task: str | None = None
    ) -> "Examples":
        """Take texts as inputs without known answers; raises DataError where there is none."""
        if not prompts:
            raise DataError("there are no prompts; give at least one text.")
        rows = [(Place("prompts", "number", n), {"input": text, "task": task}) for n, text in enumerate(prompts, 1)]
        return cls(_parsed(rows, None, False), _encoder(prompt_template, None))

    @classmethod
    def from_messages(cls, messages: list[dict[str, str]], task: str | None = None) -> "Examples":
        """Take one conversation that waits for an answer; raises DataError for a message that cannot be one."""
        row = {"messages": messages, "task": task}
        return cls(_parsed([(Place("conversation", "turn", len(messages)), row)], None, False), _encoder(None, None))

    @classmethod
    def from_data(cls, data: SFTDataModule, split: str | None = None, limit: int | None = None) -> "Examples":
        """Take the rows of a data module's ``split``: by default ``test``, or ``validation`` where there is no test."""
        chosen = split or ("test" if data.files["test"] else "validation")

        def encoder(model: Model, way: Way) -> RowEncoder:
            return data.encoder_for(model.tokenizer, model.prompt_layout, model.seq2seq)

        return cls(_parsed(data.raw_rows(chosen), limit, True, data.row_layout), encoder)

    def of_kind(self, kind: Kind) -> "Examples":
        """The rows of one kind."""
        rows = [(place, row) for place, row in self.rows if Kind(row.task, row.way) == kind]
        return Examples(rows, self.make, kind.way)

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of rows, in the order in which they come."""
        return list(dict.fromkeys(Kind(row.task, row.way) for _, row in self.rows)) or [Kind()]

    def asked(self, model: Model) -> list[Asked]:
        """Per row, its prompt's ids, its question in words and its right answer where that is known."""
        found = {id(row): one for part in map(self.of_kind, self.kinds) for row, one in part._asked(model)}
        return [found[id(row)] for _, row in self.rows]

    def _asked(self, model: Model) -> Iterable[tuple[Prompt | Chat, Asked]]:
        return zip((row for _, row in self.rows), self.encoder(model).ask(self.rows), strict=True)

    def lengths(self, model: Model) -> list[int]:
        """Per row, the tokens of its prompt, however long it is."""
        return self.encoder(model).lengths(self.rows)

    def references(self, model: Model) -> list[list[Sequence | None]]:
        """Per row, its prompt with the right answer; None where the encoder drops a row as too long."""
        return [[sequence] for sequence, _ in self.encoder(model).learn(self.rows)]

    def candidates(self, model: Model, labels: list[str]) -> list[list[Sequence | None]]:
        """Per row, its prompt with each of ``labels`` as the answer."""
        placed: list[Placed] = [(place, _answering(row, label, place)) for place, row in self.rows for label in labels]
        found = [sequence for sequence, _ in self.encoder(model).learn(placed)]
        return [found[i : i + len(labels)] for i in range(0, len(found), len(labels))]

    def expected(self, labels: list[str]) -> list[int]:
        """Number of each row's answer in ``labels``; raises DataError naming the row whose answer is none of them."""
        numbers = {label: number for number, label in enumerate(labels)}
        for place, row in self.rows:
            if _output(row) not in numbers:
                known = ", ".join(map(repr, labels))
                raise DataError(f"{place}: the answer {_output(row)!r} is none of the labels; valid: {known}.")
        return [numbers[_output(row)] for _, row in self.rows]

    def closed_set(self) -> list[str] | None:
        """The answers where they repeat and are few (2 to 20, at most half as many as rows), else None."""
        outputs = {_output(row) for _, row in self.rows}
        few = 2 <= len(outputs) <= MOST_LABELS and 2 * len(outputs) <= len(self.rows)
        return sorted(outputs) if few and not any(isinstance(row, Chat) for _, row in self.rows) else None


def _encoder(prompt_template: Template | None, answer_template: Template | None) -> Callable[[Model, Way], RowEncoder]:
    """Return what makes the encoder of a model, from the templates given and else from its adapters' own."""
    options = {"prompt_template": prompt_template, "answer_template": answer_template}
    given: dict[str, Any] = {name: text for name, text in options.items() if text is not None}
    check_templates(given.get("prompt_template", "{input}"), given.get("answer_template", " {output}"))

    def encoder(model: Model, way: Way) -> RowEncoder:
        trained = model.prompt_format(given, way)
        if unknown := trained.keys() - set(PROMPT_FORMAT):
            raise ConfigError(f"the adapter was trained with {min(unknown)!r}, unknown here; update graftwork.")
        limit = model.shape.max_position_embeddings  # rows may fill the model's context
        layout, seq2seq = model.prompt_layout, model.seq2seq
        return RowEncoder(model.tokenizer, layout, seq_length=limit, seq2seq=seq2seq, **trained, **given)

    return encoder


def _parsed(
    placed: Iterable[tuple[Place, object]], limit: int | None, answered: bool, layout: str | None = None
) -> list[Placed]:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, but it must be at least 1 row.")
    return [(place, parse_row(raw, place, answered=answered, layout=layout)) for place, raw in islice(placed, limit)]


def _answering(row: Prompt | Chat, label: str, place: Place) -> Prompt:
    if isinstance(row, Chat):
        raise DataError(f"{place}: labels need rows with 'input' and 'output', but this one holds 'messages'.")
    return row.model_copy(update={"output": label})


def _output(row: Prompt | Chat) -> str:
    return "" if isinstance(row, Chat) else row.output or ""
