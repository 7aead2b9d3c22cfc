"""A recipe as canonical text: one line per field, callables and defaults included, each line a command-line path."""

import copy
import inspect
from collections.abc import Callable, Iterator

import fiddle as fdl

Lines = dict[str, str]

TEXT, CHANGES = "recipe_text", "recipe_changes"
TOLD = (TEXT, CHANGES)
"""The fields that hold this very text, and what is set beside a recipe's own values; they are left out of it."""


def show(recipe: fdl.Buildable) -> str:
    """Return the whole recipe, one ``path = value`` a line, with the defaults of graftwork's own callables."""
    return "\n".join(f"{path} = {value}" for path, value in lines(recipe).items())


def diff(before: fdl.Buildable, after: fdl.Buildable) -> str:
    """Return the lines that ``before`` loses (``- path = value``) and ``after`` gains (``+``); '' when they agree."""
    old, new = lines(before), lines(after)
    changes = []
    for path in dict.fromkeys([*old, *new]):
        if old.get(path) != new.get(path):
            changes += [f"{sign} {path} = {side[path]}" for sign, side in (("-", old), ("+", new)) if path in side]
    return "\n".join(changes)


def with_text(recipe: fdl.Buildable) -> fdl.Buildable:
    """Return a copy that carries its own text to the run, if its verb remembers one and none is set."""
    return _carrying(recipe, TEXT, show(recipe))


def with_changes(recipe: fdl.Buildable, changes: str) -> fdl.Buildable:
    """Return a copy that carries what is set beside its own values, if its verb remembers that and none is set."""
    return _carrying(recipe, CHANGES, changes)


def _carrying(recipe: fdl.Buildable, name: str, text: str) -> fdl.Buildable:
    if name not in inspect.signature(recipe.__fn_or_cls__).parameters or getattr(recipe, name, None) is not None:
        return recipe
    carrying = copy.deepcopy(recipe)
    setattr(carrying, name, text)
    return carrying


def lines(recipe: fdl.Buildable) -> Lines:
    """Return every field's path and value as text, in signature order."""
    return dict(_walk("recipe", recipe, root=True))


def _walk(path: str, value: object, root: bool = False) -> Iterator[tuple[str, str]]:
    if isinstance(value, fdl.Buildable):
        yield path, callable_name(value.__fn_or_cls__)
        for name, child in fields(value):
            yield from _walk(name if root else f"{path}.{name}", child)
    elif isinstance(value, list | tuple) and any(isinstance(item, fdl.Buildable) for item in value):
        for index, item in enumerate(value):
            yield from _walk(f"{path}[{index}]", item)
    else:
        yield path, repr(value)


def fields(config: fdl.Buildable) -> list[tuple[str, object]]:
    """Return (name, value) of the fields that are set, and of unset ones where the callable is graftwork's own.

    A third party's defaults stay out: its next release must not change what a recipe says.
    """
    given = config.__arguments__
    ours = config.__fn_or_cls__.__module__.split(".")[0] == "graftwork"
    declared = inspect.signature(config.__fn_or_cls__).parameters
    defaults = {n: p.default for n, p in declared.items() if ours and p.default is not p.empty}
    order = [n for n in declared if n in given or n in defaults] + [n for n in given if n not in declared]
    return [(str(n), given.get(n, defaults.get(n))) for n in order if n not in TOLD]


def callable_name(target: Callable[..., object]) -> str:
    """Return ``module.name`` of a class or function; a method goes by its room, ``graftwork.peft``, and its file.

    Recipe texts are compared and hashed: they must not change because a file has moved into an inner room.
    """
    return f"{target.__module__}.{target.__qualname__}".replace("graftwork.peft.methods.", "graftwork.peft.")
