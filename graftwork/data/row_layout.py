"""The layouts in which people keep rows, told by their columns: which one a row has, and whether a file keeps to it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Optional

from graftwork.data.place import Place
from graftwork.errors import ConfigError, DataError, suggest

FIELD = "row_layout"
"""The field of a data module that says which layout rows have."""


@dataclass(frozen=True)
class RowLayout:
    """Columns that go together: ``asks`` holds the question, ``answers`` what is learned (the same in conversations).

    ``beside``: a column that may stand with them. ``valid``: what a row holds, in words. ``wider``: names of layouts
    whose columns are among these.
    """

    name: str
    title: str
    asks: str
    answers: str
    valid: str
    beside: tuple[str, ...] = ()
    wider: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All of its columns, in the order in which they are spoken of."""
        return tuple(dict.fromkeys((self.asks, *self.beside, self.answers)))

    def __str__(self) -> str:
        return f"{self.title} ({', '.join(self.columns)})"

    def fits(self, raw: Mapping[str, object]) -> bool:
        """Whether a row holds question and answer in this layout."""
        return self.asks in raw and self.answers in raw


INPUT_OUTPUT = RowLayout(
    "input_output", "input/output rows", "input", "output",
    "a row holds the strings 'input' and 'output', or 'messages', a list of {'role', 'content'}",
)  # fmt: skip
ALPACA = RowLayout(
    "alpaca", "Alpaca rows", "instruction", "output",
    "an Alpaca row holds the strings 'instruction' and 'output', and 'input' where there is one",
    beside=("input",), wider=("input_output",),
)  # fmt: skip
PROMPT_COMPLETION = RowLayout(
    "prompt_completion", "prompt/completion rows", "prompt", "completion",
    "such a row holds the strings 'prompt' and 'completion'",
)  # fmt: skip
MESSAGES = RowLayout(
    "messages", "conversations", "messages", "messages",
    "a conversation holds 'messages', a list of {'role', 'content'}, and maybe 'tools', a list",
)  # fmt: skip
SHAREGPT = RowLayout(
    "sharegpt", "ShareGPT conversations", "conversations", "conversations",
    "a ShareGPT conversation holds 'conversations', a list of {'from', 'value'}",
)  # fmt: skip

LAYOUTS = {one.name: one for one in (INPUT_OUTPUT, ALPACA, PROMPT_COMPLETION, MESSAGES, SHAREGPT)}

CONVERSATIONS = (MESSAGES, SHAREGPT)
"""Those that a chat template puts."""


def check_row_layout(name: Optional[str]) -> None:
    """Raise ConfigError unless ``name`` is that of a layout, or None."""
    if name is not None and name not in LAYOUTS:
        raise ConfigError(f"{FIELD}={name!r} is unknown; {suggest(name, LAYOUTS)}")


def layout_of(raw: Mapping[str, object], place: Place, name: Optional[str] = None) -> RowLayout:
    """Return the layout ``name``, or with None the one that the row's columns tell; raises DataError for several.

    A row that has no answer is told by its question. One that is in no layout counts as an input/output row.
    """
    if name is not None:
        check_row_layout(name)
        return LAYOUTS[name]
    found = [one for one in LAYOUTS.values() if one.fits(raw)] or [o for o in LAYOUTS.values() if o.asks in raw]
    narrower = {name for one in found for name in one.wider}
    found = [one for one in found if one.name not in narrower]
    if len(found) > 1:
        raise DataError(
            f"{place}: the row can be read as {_either(map(str, found))}; set {FIELD} to {_either(_names(found))}."
        )
    return found[0] if found else INPUT_OUTPUT


def in_one_layout(rows: Iterable[tuple[Place, object]], name: Optional[str] = None) -> Iterator[tuple[Place, object]]:
    """Yield the rows of a file; raises DataError where one has another layout than the first."""
    first: tuple[Place, RowLayout] | None = None
    for place, raw in rows:
        if name is None and isinstance(raw, dict):
            found = layout_of(raw, place)
            first = first or (place, found)
            if found != first[1]:
                raise DataError(
                    f"{place}: the row belongs to {found}, those from {first[0].unit} {first[0].number} on to "
                    f"{first[1]}; put them into a file each, or set {FIELD} to {_either(_names((first[1], found)))}."
                )
        yield place, raw


def _names(layouts: Iterable[RowLayout]) -> Iterator[str]:
    return (repr(one.name) for one in layouts)


def _either(texts: Iterable[str]) -> str:
    return " or ".join(texts)
