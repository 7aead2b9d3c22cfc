"""The sentences of every error that a user can cause, read from the sources: class, room and skeleton."""

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import graftwork
from graftwork import errors

SOURCES = Path(inspect.getfile(graftwork)).parent
CLASSES = [
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.GraftworkError)
]
"""The public classes, in the order of their definition; the first is the base of all."""
OF_THE_CALLER = "error"
"""What functions call the class that their caller chooses: that of the file they read."""


class Message(NamedTuple):
    """A sentence with gaps: ``<name>`` where a value stands, ``...`` where something longer does."""

    kind: str
    room: str
    words: str
    place: str


@cache
def messages() -> list[Message]:
    """Return every sentence, by class, room and file."""
    trees = {file: ast.parse(file.read_text()) for file in sorted(SOURCES.rglob("*.py"))}
    kinds = {name: name for name in CLASSES} | _derived(trees.values()) | {OF_THE_CALLER: CLASSES[0]}
    found = [message for file, tree in trees.items() for message in _of(file, tree, kinds)]
    return sorted(found, key=lambda m: (CLASSES.index(m.kind), m.room))


def _derived(trees: object) -> dict[str, str]:
    """Return the public class of each inner one that is derived from it."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {
        c.name: base.id for c in classes for base in c.bases if isinstance(base, ast.Name) and base.id in CLASSES[1:]
    }


def _of(file: Path, tree: ast.Module, kinds: dict[str, str]) -> Iterator[Message]:
    inside = file.relative_to(SOURCES)
    room = inside.parts[0].removesuffix(".py")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
            words = " ".join(skeleton(node.args[0]).split())
            if any(letter.isalpha() for letter in words.replace("...", "")):
                yield Message(kinds[node.func.id], room, words, f"{inside}:{node.lineno}")


def skeleton(node: ast.expr) -> str:
    """Return what an expression says, with gaps for values."""
    match node:
        case ast.Constant(value=str(words)):
            return words
        case ast.JoinedStr(values=parts):
            return "".join(skeleton(part) for part in parts)
        case ast.FormattedValue(value=inner):
            return _gap(inner)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return skeleton(left) + skeleton(right)
        case ast.IfExp(body=body, orelse=other):
            return skeleton(body) + skeleton(other)
    return "..."


def _gap(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.Name(id="self"):
            return "<method>"
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return f"<{name.strip('_').lower()}>"
        case ast.Call(func=ast.Name(id="quoted" | "repr" | "str" | "sorted" | "len"), args=[first, *_]):
            return _gap(first)
    return "..."


def listing(kind: str) -> str:
    """Return the sentences of a class as lists, one for each room."""
    rooms: dict[str, list[str]] = {}
    for message in messages():
        if message.kind == kind and message.words not in rooms.setdefault(message.room, []):
            rooms[message.room].append(message.words)
    parts = [f"### {kind} in {room}\n\n" + "\n".join(map(_item, sorted(said))) for room, said in rooms.items() if said]
    return "\n\n".join(parts)


def _item(words: str) -> str:
    fence = "``" if "`" in words else "`"
    pad = " " if "`" in words else ""
    return f"* {fence}{pad}{words}{pad}{fence}"
