"""A method's arguments as a table: names and defaults from its constructor, meanings from its docstring."""

import inspect
import re

from graftwork.peft import PEFT

_ENTRY = re.compile(r"^    (\w+): (.*?)(?=^    \w|\Z)", re.MULTILINE | re.DOTALL)


def arguments(method: type[PEFT]) -> str:
    """Return the table of a method's arguments."""
    meanings = meanings_of(method)
    rows = [
        f"| `{name}` | `{parameter.default!r}` | {meanings[name]} |"
        for name, parameter in inspect.signature(method).parameters.items()
    ]
    return "\n".join(["| argument | default | meaning |", "|---|---|---|", *rows])


def meanings_of(method: type[PEFT]) -> dict[str, str]:
    """Return what a docstring's ``Args`` say of each argument, on one line, as Markdown."""
    _, _, entries = inspect.getdoc(method).partition("Args:\n")
    flat = {name: " ".join(words.split()) for name, words in _ENTRY.findall(entries)}
    return {name: words.replace("``", "`").replace("|", "\\|") for name, words in flat.items()}
