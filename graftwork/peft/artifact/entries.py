"""Transforms as an artifact's configuration holds them, and back: every option is checked before a method sees it."""

import inspect
from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from graftwork.errors import ArtifactError, ConfigError, quoted, suggest
from graftwork.peft.artifact.config import ArtifactConfig, Entry
from graftwork.peft.asking import PromptFormat
from graftwork.peft.method import PEFT
from graftwork.peft.methods import METHODS
from graftwork.peft.stack import Stack

_STRICT = ConfigDict(strict=True)


def entries_of(stack: Stack, names: Sequence[str]) -> list[dict[str, object]]:
    """Return the entries of the named adapters of a model."""
    return [entry_of(stack.transforms[name], stack.prompt_formats.get(name, {})) for name in names]


def entry_of(transform: PEFT, prompt: PromptFormat) -> dict[str, object]:
    """Return what rebuilds an adapter, and how it was trained to be asked, as plain data."""
    return {
        "method": type(transform).__name__,
        "hyperparameters": transform.hyperparameters(),
        "prompt": dict(prompt),
    }


def transforms(config: ArtifactConfig, path: object) -> list[PEFT]:
    """Return the transforms of an artifact, inner to outer.

    Raises ArtifactError for a method or option that is unknown here, a value that cannot be, a name given twice.
    """
    found = [_transform(entry, quoted(path)) for entry in config.adapters]
    names = [transform.name for transform in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ArtifactError(f"{quoted(path)} holds two adapters named {quoted(twice)}.")
    return found


def named(held: Sequence[PEFT], names: Sequence[str] | None, path: str) -> list[PEFT]:
    """Return the named transforms, inner to outer as they were saved, in whatever order they are named.

    Raises ArtifactError for a name that the artifact does not hold, and when none is named.
    """
    by_name = {transform.name: transform for transform in held}
    for name in names or ():
        if name not in by_name:
            raise ArtifactError(f"{path} has no adapter {name!r}; {suggest(name, by_name)}")
    if names is not None and not names:
        raise ArtifactError(f"No adapter of {path} was named; leave names out for all of them.")
    return [transform for name, transform in by_name.items() if names is None or name in names]


def prompt_formats(config: ArtifactConfig, names: Sequence[str]) -> dict[str, PromptFormat]:
    """Return, by name, how the named adapters of an artifact were trained to be asked, where that is known."""
    prompts = {entry.name: entry.prompt for entry in config.adapters}
    known = {name: prompt.model_dump(exclude_unset=True) for name in names if (prompt := prompts.get(name)) is not None}
    return {name: prompt for name, prompt in known.items() if prompt}


def _transform(entry: Entry, path: str) -> PEFT:
    method = METHODS.get(entry.method)
    if method is None:
        raise ArtifactError(f"{path} uses method {quoted(entry.method)}; {suggest(entry.method, METHODS)}")
    parameters = inspect.signature(method).parameters
    for option, value in entry.hyperparameters.items():
        if option not in parameters:
            raise ArtifactError(
                f"{path} sets {entry.method}.{quoted(option, bare=True)}, unknown here; update graftwork."
            )
        _check_type(value, parameters[option], f"{path} sets {entry.method}.{option}")
    options: dict[str, Any] = dict(entry.hyperparameters)  # of the types that the method's annotations ask for
    try:
        return method(**options)
    except ConfigError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error


def _check_type(value: object, parameter: inspect.Parameter, what: str) -> None:
    try:
        TypeAdapter(parameter.annotation, config=_STRICT).validate_python(_whole(value))
    except ValidationError as error:
        expected = quoted(error.errors(include_url=False)[0]["msg"], bare=True)
        raise ArtifactError(f"{what} to {quoted(value)}: {expected}.") from error


def _whole(value: object) -> object:
    """Return ``value`` with fractions as whole numbers: where a method takes only whole ones, it says so itself."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return 1 if isinstance(value, float) else value
