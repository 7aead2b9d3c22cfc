"""Blocks of the documentation that follow from the registries: between markers, rewritten by ``make golden``.

A page holds ``<!-- NAME: written by make golden -->`` and ``<!-- end of NAME -->``; between them stands
``BLOCKS[NAME]()``, with a blank line before and after.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from graftwork.executors import EXECUTORS
from graftwork.models.weights import family_table
from graftwork.peft import METHODS
from graftwork.recipes import AUTO, RECIPES
from tests.helpers import compatibility, messages
from tests.helpers.arguments import arguments

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"
_BLOCK = re.compile(r"<!-- (\w+): written by make golden -->\n.*?<!-- end of \1 -->", re.DOTALL)


def names() -> str:
    """Return what the command line takes by name, as a table."""
    rows = {
        "--factory": (*RECIPES, AUTO),
        "peft=": (m.short_name() for m in METHODS.values()),
        "run.executor=": EXECUTORS,
    }
    return "\n".join(["| where | names |", "|---|---|", *(f"| `{where}` | {code(n)} |" for where, n in rows.items())])


def methods() -> str:
    """Return the methods with the names, learning rates and summaries that their classes give, as a table."""
    rows = [
        f"| [`{name}`]({page_of(name)}) | `{method.short_name()}` | {method.default_lr:.0e} | "
        f"{inspect.getdoc(method).splitlines()[0]} |"
        for name, method in METHODS.items()
    ]
    return "\n".join(["| method | on the command line | default lr | |", "|---|---|---|---|", *rows]).replace(
        "e-0", "e-"
    )


def page_of(method: str) -> str:
    """Return the page of a method, from the pages' directory: the one with its arguments."""
    (page,) = (page for page in pages() if f"arguments_{method}" in blocks(page))
    return page.relative_to(DOCS).as_posix()


class Fault(NamedTuple):
    """A fault that a test plants, as ``@pytest.mark.fault(told, caught)`` says: how it is told, and what catches it."""

    told: str
    caught: str
    file: str
    function: str


def faults() -> list[Fault]:
    """Return the planted faults of all tests, by file."""
    return [fault for file in sorted(TESTS.rglob("*.py")) for fault in _faults_in(file)]


def _faults_in(file: Path) -> Iterator[Fault]:
    text = file.read_text()
    if "mark.fault(" not in text:
        return
    for function in ast.walk(ast.parse(text)):
        for mark in function.decorator_list if isinstance(function, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                told, caught = (ast.literal_eval(argument) for argument in mark.args)
                yield Fault(told, caught, file.relative_to(TESTS.parent).as_posix(), function.name)


def planted() -> str:
    """Return the planted faults as a table."""
    rows = [
        f"| {i} | {fault.told} | {fault.caught} | `{fault.file.removeprefix('tests/')}`: `{fault.function}` |"
        for i, fault in enumerate(faults(), 1)
    ]
    return "\n".join(["| | the fault | what catches it | planted in `tests/` |", "|---|---|---|---|", *rows])


def code(words: Iterable[str]) -> str:
    """Return words as inline code, with commas between."""
    return ", ".join(f"`{word}`" for word in words)


BLOCKS: dict[str, Callable[[], str]] = {
    "families": family_table,
    "faults": planted,
    "layouts": compatibility.layouts_table,
    "methods": methods,
    "names": names,
    "refusals": compatibility.refusals_table,
    "support": compatibility.methods_table,
    **{f"arguments_{name}": partial(arguments, method) for name, method in METHODS.items()},
    **{f"support_{name}": partial(compatibility.of_method, name) for name in METHODS},
    **{f"messages_{kind}": partial(messages.listing, kind) for kind in messages.CLASSES},
}
"""What each block says."""


def pages() -> list[Path]:
    """Return the pages with such blocks."""
    return [page for page in sorted(DOCS.rglob("*.md")) if _BLOCK.search(page.read_text())]


def blocks(page: Path) -> list[str]:
    """Return the names of a page's blocks."""
    return _BLOCK.findall(page.read_text())


def text(page: Path) -> str:
    """Return what the page must say."""
    return _BLOCK.sub(lambda found: block(found[1]), page.read_text())


def block(name: str) -> str:
    """Return a block with its markers."""
    return f"<!-- {name}: written by make golden -->\n\n{BLOCKS[name]()}\n\n<!-- end of {name} -->"
