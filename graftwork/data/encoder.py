"""Rows to token sequences: template or chat, BOS, virtual tokens, EOS, cut to length."""

from typing import Optional, TypedDict

from graftwork.data import chat
from graftwork.data.schema import Chat, Place, Prompt
from graftwork.data.sequence import Sequence, TooLong
from graftwork.data.template import Piece, PromptTemplate, TaskTemplates, Template, check_task, template_slots
from graftwork.data.tokenizer import TextEncoder, Tokenizer
from graftwork.errors import ConfigError, DataError
from graftwork.virtual_tokens import PromptLayout

Placed = tuple[Place, Prompt | Chat]
TOO_LONG = ("error", "drop")


class PromptFormat(TypedDict):
    """The options that decide which tokens a row becomes: what generation must repeat to ask as training did."""

    prompt_template: Template
    answer_template: Template
    add_bos: bool | None
    add_eos: bool


class RowFormat(PromptFormat):
    """Every option of a RowEncoder: the prompt's format and how rows are cut."""

    seq_length: int
    too_long: str


PROMPT_FORMAT = tuple(PromptFormat.__annotations__)
"""Names of the options that decide which tokens a row becomes."""


class RowEncoder:
    """Encodes checked rows for one tokenizer, prompt layout and pair of templates (of each task, where given so).

    Prompt and answer are tokenised separately: the ids of a training prompt are the ids generation starts from.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        layout: PromptLayout | None = None,
        *,
        prompt_template: Template = "{input}",
        answer_template: Template = " {output}",
        seq_length: int = 1024,
        add_bos: Optional[bool] = None,
        add_eos: bool = True,
        too_long: str = "error",
    ) -> None:
        self.layout = layout or PromptLayout()
        self.templates = TaskTemplates(prompt_template, answer_template, self.layout)
        self.text = TextEncoder(tokenizer, add_bos, add_eos)
        self.tokenizer = tokenizer
        self.seq_length = seq_length
        self.too_long = too_long

    def learn(self, rows: list[Placed]) -> list[tuple[Sequence | None, int]]:
        """``(sequence, tokens cut away)`` per row, to learn from; the sequence is None where the row is dropped."""
        sequences = self._encode(rows, [self._learned(row, place) for place, row in rows])
        return [self._fit(sequence, place) for sequence, (place, _) in zip(sequences, rows)]

    def ask(self, rows: list[Placed]) -> list[tuple[list[int], str, str | None]]:
        """``(prompt ids, question, right answer or None)`` per row, to generate from."""
        asked = [self._asked(row, place) for place, row in rows]
        sequences = self._encode(rows, [pieces for pieces, _, _ in asked])
        for sequence, (place, _) in zip(sequences, rows):
            self._checked_cut(sequence, place)
        return [(s.tokens, question, answer) for s, (_, question, answer) in zip(sequences, asked)]

    def answers(self, outputs: list[str], task: str | None = None) -> list[list[int]]:
        """Ids each output would have as an answer to a row of ``task`` (EOS included), to compare or to score."""
        template = self.templates.of(task, Place("outputs", "number", 1))
        return [ids + self.text.end for ids in self.text.continuing([template.answer_text(o) for o in outputs])]

    def _learned(self, row: Prompt | Chat, place: Place) -> list[Piece]:
        if isinstance(row, Chat):
            return chat.learned_pieces(self.tokenizer, row, place, self.text.add_eos)
        assert row.output is not None, "parse_row(answered=True) lets no row without an answer through"
        end = [Piece(ids=tuple(self.text.end), loss=True)] if self.text.end else []
        template = self._template(row, place)
        answer = Piece(template.answer_text(row.output), loss=True)
        return [*template.prompt_pieces(row, place), answer, *end]

    def _asked(self, row: Prompt | Chat, place: Place) -> tuple[list[Piece], str, str | None]:
        if isinstance(row, Chat):
            pieces, answer = chat.prompt_pieces(self.tokenizer, row, place)
            return pieces, chat.question(row), answer
        return self._template(row, place).prompt_pieces(row, place), row.input, row.output

    def _template(self, row: Prompt, place: Place) -> PromptTemplate:
        check_task(self.layout, row.task, place)  # first: it may be that a template of another name does not exist
        return self.templates.of(row.task, place)

    def _encode(self, rows: list[Placed], pieces: list[list[Piece]]) -> list[Sequence]:
        """Tokenise all texts of many rows in two calls (fast tokenizers work on them in parallel), then assemble."""
        first = [next((i for i, p in enumerate(row) if p.text), -1) for row in pieces]
        starts = iter(self.text.starting([row[i].text for row, i in zip(pieces, first) if i >= 0]))
        later = [p.text for row, i in zip(pieces, first) for k, p in enumerate(row) if p.text and k != i]
        continued = iter(self.text.continuing(later))
        sequences = []
        for (place, row), parts, i in zip(rows, pieces, first):
            body = Sequence()
            for k, part in enumerate(parts):
                ids = part.ids if not part.text else next(starts) if k == i else next(continued)
                body.extend(ids, loss=part.loss, loose=bool(part.text))
            sequences.append(self._headed(body, row, place))
        return sequences

    def _headed(self, body: Sequence, row: Prompt | Chat, place: Place) -> Sequence:
        """Put BOS and the virtual tokens of this row's task before the body."""
        is_chat = isinstance(row, Chat)
        check_task(self.layout, row.task, place)
        if is_chat and template_slots(self.layout, row.task):
            raise ConfigError(
                "prompt adapters with placement='template' need rows with 'input' and 'output'; "
                f"{place} is a conversation: use placement='prefix' or 'before_bos'."
            )
        # Chat templates write BOS themselves; elsewhere a template may do so too: never twice.
        written = bool(self.text.head) and body.tokens[:1] == self.text.head
        head = Sequence()
        head.extend(self.layout.placed("before_bos", row.task))
        if written or not is_chat:
            head.extend(self.text.head)
        head.extend(self.layout.placed("prefix", row.task))
        head.join(body, skip=int(written))
        return head

    def _fit(self, sequence: Sequence, place: Place) -> tuple[Sequence | None, int]:
        try:
            return sequence, self._checked_cut(sequence, place)
        except TooLong:
            if self.too_long == "drop":
                return None, 0
            raise

    def _checked_cut(self, sequence: Sequence, place: Place) -> int:
        if sequence.loss[:1] == [True] or not sequence.tokens:
            raise DataError(f"{place}: the prompt is empty, nothing precedes the answer; fill it or set add_bos=True.")
        try:
            return sequence.cut(self.seq_length)
        except TooLong as error:
            raise TooLong(f"{place}: {error}; raise seq_length, shorten the row or set too_long='drop'.") from None
