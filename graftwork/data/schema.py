"""What a row of a data file must look like; errors name the file, the line and the field."""

import difflib
import itertools
from collections.abc import Mapping, Set
from typing import Annotated, Literal, NamedTuple, Optional

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from graftwork.data.place import Place
from graftwork.data.row_layout import ALPACA, INPUT_OUTPUT, LAYOUTS, MESSAGES, PROMPT_COMPLETION, SHAREGPT, layout_of
from graftwork.errors import DataError, quoted
from graftwork.jsonfile import parse_json
from graftwork.ways import Way, way

_COMPARED = 100
"""Most fields, and characters of each, that are compared with the right names."""

OPTIONAL = "'task' and 'adapter' (a name, or a list of names) are optional"
"""What every row may hold."""

ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""What ShareGPT's names of who speaks mean."""


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: half of a surrogate pair, which JSON can hold, cannot."""
    return value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)


def _whole_pairs(value: str) -> str:
    if not is_text(value):
        raise ValueError(HALF_PAIR)
    return value


HALF_PAIR = "half of a surrogate pair (\\ud800 to \\udfff) is no text"

Text = Annotated[str, AfterValidator(_whole_pairs)]
"""A string that a tokenizer takes."""

Answer = Annotated[str, Field(min_length=1), AfterValidator(_whole_pairs)]
"""What is learned: empty, it would be nothing."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    task: Optional[Text] = None
    adapter: Text | list[Text] | None = None

    @field_validator("task")
    @classmethod
    def _no_empty_task(cls, task: Optional[str]) -> Optional[str]:
        return task or None

    @property
    def way(self) -> Way:
        """The adapters that act on this row: those it names, none where it names nobody, all where it says nothing."""
        return way(self.adapter) if "adapter" in self.model_fields_set else None


class Prompt(_Row):
    """A row to answer: ``input``, and ``output`` where the right answer is known."""

    input: Text
    output: Optional[Text] = None

    @property
    def fields(self) -> dict[str, object]:
        """What a prompt template may name: ``input`` and every further field of the row."""
        return {**(self.model_extra or {}), "input": self.input}

    @property
    def question(self) -> str:
        """What is asked, in words."""
        return self.input

    def put(self, names: Set[str]) -> dict[str, object]:
        """Return the fields as a template reads them that names ``names``."""
        return self.fields


class Example(Prompt):
    """A row to learn from: the answer is there and not empty."""

    output: Answer


class Alpaca(Prompt):
    """A row whose question is an instruction, and an input that the instruction is about where there is one."""

    instruction: Annotated[Text, BeforeValidator(lambda value: value or "")]
    input: Annotated[Text, BeforeValidator(lambda value: value or "")] = ""

    @property
    def fields(self) -> dict[str, object]:
        """What a prompt template may name: both parts of the question and every further field of the row."""
        return {**super().fields, "instruction": self.instruction}

    @property
    def question(self) -> str:
        """The instruction, and below it the input."""
        return "\n".join(text for text in (self.instruction, self.input) if text)

    def put(self, names: Set[str]) -> dict[str, object]:
        """As they stand where a template names ``instruction``; else ``input`` is the whole question."""
        return self.fields if "instruction" in names else {**(self.model_extra or {}), "input": self.question}


class AlpacaExample(Alpaca):
    """One to learn from."""

    output: Answer


class Completion(Prompt):
    """A row in OpenAI's older layout: a text and what follows it."""

    input: Text = Field(alias="prompt")
    output: Optional[Text] = Field(alias="completion", default=None)


class CompletionExample(Completion):
    """One to learn from."""

    output: Answer = Field(alias="completion")


def _joined(content: object) -> object:
    """Return a list of parts of text as one text; raises ValueError for a part that is none."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content, 1):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type", part) if isinstance(part, dict) else part
            raise ValueError(f"part {number} is {quoted(kind, 60)}, and only parts of type 'text' can be learned from")
    return "".join(part["text"] for part in content)


def _read(tools: object) -> object:
    """Return what is written as JSON in a string, as files that must keep to one schema hold it."""
    if not isinstance(tools, str):
        return tools
    try:
        return parse_json(_whole_pairs(tools).encode(), "the string", DataError) if tools else None
    except DataError as error:
        raise ValueError(str(error).removesuffix(".")) from None


class Message(BaseModel):
    """One turn of a conversation; further fields are handed to the chat template.

    ``weight`` 0: a turn of the assistant's that is read and not learned.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text, BeforeValidator(_joined)]
    weight: Optional[Literal[0, 1]] = Field(default=None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        """Leave out what tables write where a message has no such field; a call of tools needs no text."""
        if not isinstance(value, dict):
            return value
        kept = {name: part for name, part in value.items() if part is not None or name in ("role", "content")}
        return {**kept, "content": kept.get("content") or ""} if kept.get("tool_calls") else kept

    @property
    def learned(self) -> bool:
        """Whether the turn is one to learn."""
        return self.role == "assistant" and self.weight != 0


class Chat(_Row):
    """A conversation to continue; ``tools``: what the assistant may call, as the chat template takes them."""

    messages: list[Message] = Field(min_length=1)
    tools: Annotated[Optional[list[dict[str, object]]], BeforeValidator(_read)] = None


class ShareGPT(Chat):
    """A conversation whose turns say ``from`` and ``value``."""

    messages: list[Message] = Field(alias="conversations", min_length=1)

    @field_validator("messages", mode="before")
    @classmethod
    def _as_messages(cls, turns: object) -> object:
        return [_message(turn, number) for number, turn in enumerate(turns)] if isinstance(turns, list) else turns


class ChatExample(Chat):
    """A conversation to learn from: somebody speaks first, and the last word is the assistant's."""

    @model_validator(mode="after")
    def _has_answer(self) -> "ChatExample":
        roles, name = [message.role for message in self.messages], type(self).model_fields["messages"].alias
        turns = repr(name or "messages")
        if roles[0] == "assistant":
            raise ValueError(f"the first of {turns} must not be the assistant's")
        if "assistant" not in roles:
            raise ValueError(f"none of {turns} is the assistant's, so there is no answer to learn")
        if roles[-1] != "assistant":
            raise ValueError(f"the last of {turns} is the {roles[-1]}'s, and nobody answers it; take it out")
        if not any(message.learned for message in self.messages):
            raise ValueError("every answer has the weight 0, so there is none to learn")
        return self


class ShareGPTExample(ShareGPT, ChatExample):
    """One to learn from."""


class _Kinds(NamedTuple):
    asked: type[Prompt] | type[Chat]
    learned: type[Prompt] | type[Chat]


KINDS = {
    INPUT_OUTPUT.name: _Kinds(Prompt, Example),
    ALPACA.name: _Kinds(Alpaca, AlpacaExample),
    PROMPT_COMPLETION.name: _Kinds(Completion, CompletionExample),
    MESSAGES.name: _Kinds(Chat, ChatExample),
    SHAREGPT.name: _Kinds(ShareGPT, ShareGPTExample),
}
"""What a row of each layout is checked by: to be answered, and to be learned from."""


def parse_row(raw: object, place: Place, *, answered: bool, layout: Optional[str] = None) -> Prompt | Chat:
    """Check one row; ``answered`` asks for an answer to learn from, ``layout`` None for the one that its columns tell.

    Raises DataError naming place and field.
    """
    if not isinstance(raw, dict):
        got = quoted(raw, 60)
        raise DataError(f"{place}: a row must be an object with named fields, got {got}; {_valid(layout)}.")
    found = layout_of(raw, place, layout).name
    try:
        return KINDS[found][answered].model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{place}: {_explain(error, raw)}; {_valid(found)}.") from None


def _valid(layout: Optional[str]) -> str:
    return f"{LAYOUTS[layout or INPUT_OUTPUT.name].valid}; {OPTIONAL}"


def _message(turn: object, number: int) -> object:
    """Return a turn as a message; one that says ``role`` already is left as it is."""
    if not isinstance(turn, dict) or ("role" in turn and "from" not in turn):
        return turn
    said = turn.get("from")
    if not isinstance(said, str) or said not in ROLES:
        heard = "is missing" if said is None else f"is {quoted(said)}"
        raise ValueError(f"'from' of turn {number + 1} {heard} (valid: {', '.join(ROLES)})")
    if "value" not in turn:
        raise ValueError(f"'value' of turn {number + 1} is missing")
    rest = {name: part for name, part in turn.items() if name not in ("from", "value")}
    return {**rest, "role": ROLES[said], "content": turn["value"]}


def _explain(error: ValidationError, raw: Mapping[str, object]) -> str:
    first = error.errors(include_url=False)[0]
    name = quoted(".".join(str(part) for part in first["loc"]), bare=True)
    if first["type"] == "missing":
        return f"field {name!r} is missing{_misspelt(raw) if len(first['loc']) == 1 else ''}"
    if first["type"] == "value_error":
        return f"field {name!r}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    said = first["msg"][0].lower() + first["msg"][1:]
    return f"field {name!r}: {said}, got {quoted(first['input'], 60)}"


def _misspelt(raw: Mapping[str, object]) -> str:
    """Say which of the row's unknown fields looks like a required one."""
    columns = {column for layout in LAYOUTS.values() for column in layout.columns}
    wanted = [name for name in (*layout_of(raw, Place("", "", 0)).columns, "messages") if name not in raw]
    for found in itertools.islice(raw, _COMPARED):
        near = difflib.get_close_matches(str(found)[:_COMPARED], wanted, n=1, cutoff=0.6)
        if near and found not in (*columns, "task", "adapter"):
            return f" (did you mean {near[0]!r} where it says {quoted(found)}?)"
    return f" (it has {', '.join(quoted(str(k), 60) for k in list(raw)[:8]) or 'no fields'})"
