"""The path of a field in a recipe, ``peft[0].dim``, as ``show`` prints it and the command line takes it."""

import inspect
import re

import fiddle as fdl

from graftwork.errors import suggest


def follow(config: fdl.Buildable, path: str) -> tuple[fdl.Buildable | list[object], str, str]:
    """Walk ``a.b[0].c`` and return (owner of the last field, that field, why the walk stopped or '').

    The owner is a list where the path ends in an index.
    """
    parts = re.findall(r"\w+", path)
    owner: fdl.Buildable | list[object] = config
    seen = ""
    for part in parts[:-1]:
        reason = absent(owner, part, seen)
        if reason:
            return owner, part, reason
        owner = owner[int(part)] if isinstance(owner, list) else getattr(owner, part)
        seen = f"{seen}[{part}]" if part.isdigit() else f"{seen}.{part}".lstrip(".")
    return owner, parts[-1], absent(owner, parts[-1], seen, last=True)


def absent(config: object, part: str, seen: str, last: bool = False) -> str:
    """Return why ``config`` (at path ``seen``) has no ``part``, or ''."""
    where = seen or "the recipe"
    if isinstance(config, list):
        inside = part.isdigit() and int(part) < len(config)
        return "" if inside else f"{where} holds {len(config)} item(s); use {where}[0] to {where}[{len(config) - 1}]."
    if not isinstance(config, fdl.Buildable):
        return f"{where} is {config!r} and has no field {part!r}."
    names = list(inspect.signature(config.__fn_or_cls__).parameters)
    if part not in names:
        return f"{where} has no field {part!r}; {suggest(part, names)}"
    return "" if last or hasattr(config, part) else f"{seen}.{part} is not set".lstrip(".") + ", so it has no fields."


def put(config: fdl.Buildable, path: str, value: object) -> str:
    """Set the field at ``path`` in place; return why there is none, or ''."""
    owner, field, reason = follow(config, path)
    if reason:
        return reason
    if isinstance(owner, list):
        owner[int(field)] = value
    else:
        setattr(owner, field, value)
    return ""
