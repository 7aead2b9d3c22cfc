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
NO_CHAT = "the row holds 'messages', but a sequence-to-sequence model learns from rows with 'input' and 'output'."


class PromptFormat(TypedDict):
    """The options that decide which tokens a row becomes: what generation must repeat to ask as training did."""

    prompt_template: Template
    answer_template: Template
    add_bos: bool | None
    add_eos: bool


class RowFormat(PromptFormat):
    """Every option of a RowEncoder that rows decide: the prompt's format and how rows are cut."""

    seq_length: int
    answer_length: int | None
    too_long: str


PROMPT_FORMAT = tuple(PromptFormat.__annotations__)
"""Names of the options that decide which tokens a row becomes."""


def check_kind(seq2seq: bool, answer_length: int | None, add_bos: bool | None) -> None:
    """Raise ConfigError for an option that this kind of model has no use for."""
    if seq2seq and add_bos:
        raise ConfigError("add_bos=True is not for sequence-to-sequence models: their rows have no BOS; leave it out.")
    if not seq2seq and answer_length is not None:
        raise ConfigError(
            f"answer_length={answer_length} is for sequence-to-sequence models; with this one seq_length limits prompt "
            "and answer together: leave answer_length out."
        )


def _beginning(template: Template) -> Template:
    """Return the templates of answers that begin a text."""
    if isinstance(template, str):
        return template.lstrip()
    return {task: text.lstrip() for task, text in template.items()}


class RowEncoder:
    """Encodes checked rows for one tokenizer, prompt layout and pair of templates (of each task, where given so).

    Prompt and answer are tokenised separately: the ids of a training prompt are the ids generation starts from.
    ``seq2seq``: an encoder reads the prompt, which has no BOS and ends as the tokenizer ends a text; a decoder gives
    the answer, which begins a text of its own, so its template's leading space is left out. ``seq_length`` then limits
    the prompt and ``answer_length`` (None: as much) the answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        layout: PromptLayout | None = None,
        *,
        prompt_template: Template = "{input}",
        answer_template: Template = " {output}",
        seq_length: int = 1024,
        answer_length: Optional[int] = None,
        add_bos: Optional[bool] = None,
        add_eos: bool = True,
        too_long: str = "error",
        seq2seq: bool = False,
    ) -> None:
        check_kind(seq2seq, answer_length, add_bos)
        self.layout = layout or PromptLayout()
        answers = _beginning(answer_template) if seq2seq else answer_template
        self.templates = TaskTemplates(prompt_template, answers, self.layout)
        self.text = TextEncoder(tokenizer, False if seq2seq else add_bos, add_eos)
        self.tokenizer = tokenizer
        self.seq2seq = seq2seq
        self.seq_length = seq_length
        self.answer_length = seq_length if answer_length is None else answer_length
        self.too_long = too_long

    def learn(self, rows: list[Placed]) -> list[tuple[Sequence | None, int]]:
        """``(sequence, tokens cut away)`` per row, to learn from; the sequence is None where the row is dropped."""
        return [self._fit(sequence, place) for sequence, (place, _) in zip(self.whole(rows), rows)]

    def whole(self, rows: list[Placed]) -> list[Sequence]:
        """Every row as it would be learned from, before it is cut to a length."""
        return self._encode(rows, [self._learned(row, place) for place, row in rows])

    def ask(self, rows: list[Placed]) -> list[tuple[list[int], str, str | None]]:
        """``(prompt ids, question, right answer or None)`` per row, to generate from."""
        asked = [self._asked(row, place) for place, row in rows]
        sequences = self._encode(rows, [pieces for pieces, _, _ in asked])
        for sequence, (place, _) in zip(sequences, rows):
            self.cut(sequence, place)
        return [(s.tokens, question, answer) for s, (_, question, answer) in zip(sequences, asked)]

    def lengths(self, rows: list[Placed]) -> list[int]:
        """Tokens of every prompt to generate from, before ``ask`` cuts it."""
        return [len(one) for one in self._encode(rows, [self._asked(row, place)[0] for place, row in rows])]

    def cut(self, sequence: Sequence, place: Place) -> int:
        """Cut one row of ``whole`` to its length and return how many tokens went; raises TooLong, DataError."""
        if sequence.loss[:1] == [True] or not sequence.tokens:
            more = "" if self.seq2seq else " or set add_bos=True"
            raise DataError(f"{place}: the prompt is empty, nothing precedes the answer; fill it{more}.")
        try:
            if self.seq2seq:
                return sequence.cut_apart(self.seq_length, self.answer_length)
            return sequence.cut(self.seq_length)
        except TooLong as error:
            said = f"{place}: {error}; raise {error.option}, shorten the row or set too_long='drop'."
            raise TooLong(said, error.option) from None

    def answers(self, outputs: list[str], task: str | None = None) -> list[list[int]]:
        """Ids each output would have as an answer to a row of ``task`` (EOS included), to compare or to score."""
        template = self.templates.of(task, Place("outputs", "number", 1))
        tokenise = self.text.starting if self.seq2seq else self.text.continuing
        return [ids + self.text.end for ids in tokenise([template.answer_text(o) for o in outputs])]

    def _learned(self, row: Prompt | Chat, place: Place) -> list[Piece]:
        self._refuse_chat(row, place)
        if isinstance(row, Chat):
            return chat.learned_pieces(self.tokenizer, row, place, self.text.add_eos)
        assert row.output is not None, "parse_row(answered=True) lets no row without an answer through"
        end = [Piece(ids=tuple(self.text.end), loss=True)] if self.text.end else []
        answer = Piece(self._template(row, place).answer_text(row.output), loss=True)
        return [*self._prompt(row, place), answer, *end]

    def _asked(self, row: Prompt | Chat, place: Place) -> tuple[list[Piece], str, str | None]:
        self._refuse_chat(row, place)
        if isinstance(row, Chat):
            pieces, answer = chat.prompt_pieces(self.tokenizer, row, place)
            return pieces, chat.question(row), answer
        return self._prompt(row, place), row.question, row.output

    def _prompt(self, row: Prompt, place: Place) -> list[Piece]:
        end = self.text.source_end if self.seq2seq else []
        return [*self._template(row, place).prompt_pieces(row, place), *([Piece(ids=tuple(end))] if end else [])]

    def _refuse_chat(self, row: Prompt | Chat, place: Place) -> None:
        if self.seq2seq and isinstance(row, Chat):
            raise DataError(f"{place}: {NO_CHAT}")

    def _template(self, row: Prompt, place: Place) -> PromptTemplate:
        # first: it may be that a template of another name does not exist
        check_task(self.layout.on(row.way), row.task, place)
        return self.templates.of(row.task, place)

    def _encode(self, rows: list[Placed], pieces: list[list[Piece]]) -> list[Sequence]:
        """Tokenise all texts of many rows in two calls (fast tokenizers work on them in parallel), then assemble."""
        begins = [self._beginnings(parts) for parts in pieces]
        marked = [(p.text, k in first) for parts, first in zip(pieces, begins) for k, p in enumerate(parts) if p.text]
        starts = iter(self.text.starting([text for text, begin in marked if begin]))
        continued = iter(self.text.continuing([text for text, begin in marked if not begin]))
        sequences = []
        for (place, row), parts, first in zip(rows, pieces, begins):
            body = Sequence()
            for k, part in enumerate(parts):
                ids = part.ids if not part.text else next(starts) if k in first else next(continued)
                if not self._is_doubled(part, body):
                    body.extend(ids, loss=part.loss, loose=bool(part.text))
            sequences.append(self._headed(body, row, place))
        return sequences

    def _beginnings(self, parts: list[Piece]) -> set[int]:
        """Numbers of the pieces of text that begin a sequence: the first one, and the answer of a decoder."""
        texts = [k for k, part in enumerate(parts) if part.text]
        return {*texts[:1], *(k for k in texts if self.seq2seq and parts[k].loss)}

    def _is_doubled(self, part: Piece, body: Sequence) -> bool:
        """Whether a piece is the end of a prompt whose text has written it already."""
        end = self.text.source_end
        return self.seq2seq and not part.text and not part.loss and list(part.ids) == end == body.tokens[-1:]

    def _headed(self, body: Sequence, row: Prompt | Chat, place: Place) -> Sequence:
        """Put BOS and the virtual tokens of this row's task and adapters before the body."""
        is_chat, layout = isinstance(row, Chat), self.layout.on(row.way)
        check_task(layout, row.task, place)
        if is_chat and template_slots(layout, row.task):
            raise ConfigError(
                "prompt adapters with placement='template' need rows with 'input' and 'output'; "
                f"{place} is a conversation: use placement='prefix' or 'before_bos'."
            )
        # Chat templates write BOS themselves; elsewhere a template may do so too: never twice.
        written = bool(self.text.head) and body.tokens[:1] == self.text.head
        head = Sequence()
        head.extend(layout.placed("before_bos", row.task))
        if written or not is_chat:
            head.extend(self.text.head)
        head.extend(layout.placed("prefix", row.task))
        head.join(body, skip=int(written))
        return head

    def _fit(self, sequence: Sequence, place: Place) -> tuple[Sequence | None, int]:
        try:
            return sequence, self.cut(sequence, place)
        except TooLong:
            if self.too_long == "drop":
                return None, 0
            raise
