"""What a row of a data file must look like; errors name the file, the line and the field."""

import difflib
import itertools
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, Optional

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from graftwork.errors import DataError, quoted
from graftwork.ways import Way, way

_COMPARED = 100
"""Most fields, and characters of each, that are compared with the right names."""

VALID_ROWS = (
    "a row holds the strings 'input' and 'output', or 'messages', a list of {'role', 'content'}; "
    "'task' and 'adapter' (a name, or a list of names) are optional"
)


class Place(NamedTuple):
    """Where a row stands: file, unit ("line" or "row") and its 1-based number."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


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


class Example(Prompt):
    """A row to learn from: the answer is there and not empty."""

    output: Text = Field(min_length=1)


class Message(BaseModel):
    """One turn of a conversation; further fields are handed to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text


class Chat(_Row):
    """A conversation to continue."""

    messages: list[Message] = Field(min_length=1)


class ChatExample(Chat):
    """A conversation to learn from: somebody speaks first, then the assistant answers at least once."""

    @model_validator(mode="after")
    def _has_answer(self) -> "ChatExample":
        roles = [message.role for message in self.messages]
        if roles[0] == "assistant":
            raise ValueError("the first of 'messages' must not be the assistant's")
        if "assistant" not in roles:
            raise ValueError("none of 'messages' has the role 'assistant', so there is no answer to learn")
        return self


def parse_row(raw: object, place: Place, *, answered: bool) -> Prompt | Chat:
    """Check one row; ``answered`` asks for an answer to learn from. Raises DataError naming place and field."""
    if not isinstance(raw, dict):
        raise DataError(f"{place}: a row must be an object with named fields, got {quoted(raw, 60)}; {VALID_ROWS}.")
    kind: type[Prompt] | type[Chat]
    if "messages" in raw:
        kind = ChatExample if answered else Chat
    else:
        kind = Example if answered else Prompt
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{place}: {_explain(error, raw)}; {VALID_ROWS}.") from None


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
    wanted = [name for name in ("input", "output", "messages") if name not in raw]
    for found in itertools.islice(raw, _COMPARED):
        near = difflib.get_close_matches(str(found)[:_COMPARED], wanted, n=1, cutoff=0.6)
        if near and found not in ("input", "output", "messages", "task", "adapter"):
            return f" (did you mean {near[0]!r} where it says {quoted(found)}?)"
    return f" (it has {', '.join(quoted(str(k), 60) for k in list(raw)[:8]) or 'no fields'})"
