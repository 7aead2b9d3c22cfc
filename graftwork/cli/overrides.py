"""The override grammar: what NeMo Run's parser refuses, said in one sentence that names what is valid."""

import inspect
import re
from collections.abc import Callable

import nemo_run as run
from nemo_run.cli.api import EXECUTOR_CLASSES, extract_constituent_types
from nemo_run.cli.cli_parser import CLIException, parse_factory
from nemo_run.config import get_type_namespace
from omegaconf.errors import OmegaConfBaseException

from graftwork.errors import suggest
from graftwork.recipes.paths import follow

PARSE_ERRORS = (CLIException, OmegaConfBaseException, ValueError, TypeError, AttributeError, LookupError)

_OVERRIDE = re.compile(r"^([\w.\[\]]+?)\s*([+*/|&-]?=)\s*(.*)$", re.DOTALL)
_CALL = re.compile(r"^([\w.]+)(?:\((.*)\))?$", re.DOTALL)
_NOT_A_METHOD = {"none", "null", ""}

Maker = Callable[..., object]
"""A verb, or a factory that the command line calls by name."""


def stack_as_list(args: list[str]) -> list[str]:
    """Return ``args`` with a bare transform made a list: ``peft=lora`` is ``peft=[lora]``."""
    return [_as_list(a) if a.startswith("peft=") else a for a in args]


def _as_list(arg: str) -> str:
    value = arg.removeprefix("peft=").strip()
    return arg if value.lower() in _NOT_A_METHOD or value.startswith(("[", "@")) else f"peft=[{value}]"


def explain_executor(args: list[str]) -> str:
    """Return why the ``run.*`` arguments were refused, or an empty string."""
    names = factories(*EXECUTOR_CLASSES)
    chosen = next((arg.removeprefix("run.executor=") for arg in args if arg.startswith("run.executor=")), None)
    if chosen is None:
        return ""
    if chosen not in names:
        return f"no executor is called {chosen!r}; {suggest(chosen, names)} Its fields: run.executor.FIELD=VALUE."
    valid = inspect.signature(names[chosen]).parameters
    for arg in args:
        found = re.match(r"run\.executor\.(\w+)(.*)", arg, re.DOTALL)
        if found and found[1] not in valid:
            return f"executor {chosen!r} has no field {found[1]!r}; {suggest(found[1], valid)}"
    return ""


def explain_overrides(fn: Maker, factory: str | None, args: list[str]) -> str:
    """Return why ``--factory`` or one of ``args`` was refused, or an empty string when nothing is found."""
    if isinstance(factory, str) and (reason := explain_call(factory, factories(fn), "recipe")):
        return reason
    try:
        config = parse_factory(fn, "", fn, factory) if isinstance(factory, str) else run.Partial(fn)
    except PARSE_ERRORS:
        return explain_arguments(str(factory), factories(fn))
    return explain_fields(config, args)


def explain_arguments(call: str, makers: dict[str, Maker]) -> str:
    """Return which argument of ``name(argument=value)`` has a value of the wrong type, or ''."""
    found = _CALL.match(call.strip())
    name, arguments = found.groups() if found else (call, "")
    for argument in split_calls(arguments or ""):
        field, _, value = argument.partition("=")
        try:
            run.cli.parse_cli_args(makers[name], [argument], output_type=run.Partial)
        except PARSE_ERRORS:
            return explain_value(
                f"{name}: {field}", value, inspect.signature(makers[name]).parameters[field].annotation
            )
    return ""


def explain_fields(config: run.Config, args: list[str]) -> str:
    """Return why one of ``args`` does not fit ``config``, or an empty string when nothing is found."""
    for arg in args:
        try:
            run.cli.parse_cli_args(config, [arg])
        except PARSE_ERRORS as error:
            return explain_one(config, arg, error)
    return ""


def explain_one(config: run.Config, arg: str, error: Exception) -> str:
    """Return the sentence for one refused override of ``config``."""
    found = _OVERRIDE.match(arg)
    if found is None:
        return f"{arg!r} is no override; write FIELD=VALUE, for example trainer.max_steps=60."
    path, _, value = found.groups()
    owner, field, reason = follow(config, path)
    if reason or isinstance(owner, list):
        return reason or f"{arg}: {error}"
    annotation = inspect.signature(owner.__fn_or_cls__).parameters[field].annotation
    return explain_value(path, value, annotation) or f"{arg}: {error}"


def explain_value(path: str, value: str, annotation: object) -> str:
    """Return why ``value`` does not suit ``annotation``: a wrong method or argument name, else a wrong type."""
    makers = factories(*classes(annotation))
    if makers:
        calls = split_calls(value.strip()[1:-1]) if value.strip().startswith("[") else [value]
        reasons = (explain_call(call, makers, path) for call in calls)
        return next((reason for reason in reasons if reason), "")
    wanted = getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)
    return f"{path}={value} is not valid: a value of type {wanted.replace('typing.', '')} is expected."


def explain_call(call: str, makers: dict[str, Maker], what: str) -> str:
    """Return why ``name(argument=value, ...)`` fits none of ``makers``, or ''."""
    found = _CALL.match(call.strip())
    if found is None:
        return f"{what}: {call!r} cannot be read; write NAME or NAME(argument=value)."
    name, arguments = found.groups()
    if name not in makers:
        return f"no {what} is called {name!r}; {suggest(name, makers)}"
    valid = list(inspect.signature(makers[name]).parameters)
    calls = split_calls(arguments or "")
    if odd := next((call for call in calls[1:] if "=" not in call), None):
        return f"{odd!r} of {name}(...) is no argument=value; a comma separates arguments, and no value can hold one."
    given = [a.split("=")[0].strip() for a in calls if "=" in a]
    wrong = next((g for g in given if g not in valid), None)
    return f"{name} has no argument {wrong!r}; {suggest(wrong, valid)}" if wrong else ""


def split_calls(text: str) -> list[str]:
    """Split ``a(x=1, y=2), b`` at the commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [p.strip() for p in parts if p.strip()]


def classes(annotation: object) -> list[type]:
    """Return the classes an annotation is made of."""
    return [t for t in extract_constituent_types(annotation) if isinstance(t, type)]


def factories(*targets: Maker) -> dict[str, Maker]:
    """Return the factories registered for any of some classes or verbs, by name."""
    return {f.__name__: f for target in targets for f in run.cli.list_factories(get_type_namespace(target))}
