"""A grid of recipes: every combination of some fields' values, each with a run directory of its own."""

import copy
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import fiddle as fdl
import nemo_run as run

from graftwork.errors import ConfigError, quoted, suggest
from graftwork.recipes.paths import follow, put
from graftwork.recipes.show import lines

DIRECTORY = "trainer.default_root_dir"
LONGEST_NAME = 100
"""Longer names of runs are cut, and told apart by a hash."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")


def grid(recipe: run.Partial, axes: Mapping[str, Sequence[object]]) -> list[run.Partial]:
    """Return a copy of ``recipe`` for every combination of the values of ``axes``; the last axis changes fastest.

    ``axes``: paths as ``show`` prints them, ``{"peft[0].dim": [8, 16], "optim.lr": [1e-4, 1e-3]}``; they are set in
    this order, so that ``peft`` may come before ``peft[0].dim``. Each run's directory is one below the recipe's own,
    named by its values: ``runs/default/dim-8_lr-0.0001``. Raises ConfigError for a path that is none, an axis without
    values, and combinations that would share a directory.
    """
    _check_axes(recipe, axes)
    root = Path(recipe.trainer.default_root_dir)
    made: dict[str, run.Partial] = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        name = run_name(chosen)
        if name in made:
            raise ConfigError(f"two runs of the grid would be called {name!r}; give each value of an axis once.")
        made[name] = _changed(recipe, {**chosen, DIRECTORY: str(root / name)})
    return list(made.values())


def run_name(values: Mapping[str, object]) -> str:
    """Return the name of the run with these values by path: ``dim-8_lr-0.0001``."""
    parts = (f"{key}-{_said(value)}" for key, value in zip(_keys(list(values)), values.values()))
    return _short("_".join(_UNSAFE.sub("-", part) for part in parts), LONGEST_NAME)


def _check_axes(recipe: run.Partial, axes: Mapping[str, Sequence[object]]) -> None:
    if not axes:
        raise ConfigError('a grid needs a field to change, for example {"peft[0].dim": [8, 16]}.')
    if not getattr(getattr(recipe, "trainer", None), "default_root_dir", None):
        raise ConfigError(f"the recipe has no {DIRECTORY}, below which the runs would go; set it.")
    for path, values in axes.items():
        if not _PATH.fullmatch(path):
            raise ConfigError(f"{quoted(path)} is no path of a field; {suggest(path, lines(recipe))}")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"the grid's {path} is {quoted(values)}; a list of values is valid.")
    tokens = [(path, _tokens(path)) for path in axes]
    for path, parts in tokens:
        if parts == _tokens(DIRECTORY):
            raise ConfigError(f"{path} cannot be an axis of the grid: it sets it itself, from the values of each run.")
        if sum(parts == other for _, other in tokens) > 1:
            raise ConfigError(f"{path} cannot be an axis of the grid: it is given twice.")


def _changed(recipe: run.Partial, values: Mapping[str, object]) -> run.Partial:
    changed = copy.deepcopy(recipe)
    for path, value in values.items():
        if reason := put(changed, path, copy.deepcopy(value)):
            raise ConfigError(f"the grid's {path}: {reason}{_near(changed, path)}")
    return changed


def _near(recipe: run.Partial, path: str) -> str:
    """Return where the recipe has a field of that name, if it is elsewhere."""
    field = _tokens(path)[-1]
    found = [known for known in lines(recipe) if _tokens(known)[-1] == field]
    _, last, reason = follow(recipe, path)
    return f" Fields of that name: {', '.join(found[:4])}." if reason and last == field and found else ""


def _tokens(path: str) -> list[str]:
    """Return the parts of a path, an index with the list that it belongs to: ``peft0``, ``dim``."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path).replace("[", "").replace("]", "").split(".")


def _keys(paths: Sequence[str]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    tokens = [_tokens(path) for path in paths]
    sizes = [1] * len(tokens)
    while True:
        keys = [".".join(parts[-size:]) for parts, size in zip(tokens, sizes)]
        longer = [
            size + 1 if keys.count(key) > 1 and size < len(parts) else size
            for key, size, parts in zip(keys, sizes, tokens)
        ]
        if longer == sizes:
            return keys
        sizes = longer


def _said(value: object) -> str:
    if isinstance(value, fdl.Buildable):
        target = value.__fn_or_cls__
        short = getattr(target, "short_name", None)  # a method's; its class would take seconds to import
        arguments = (f"{name}-{_said(given)}" for name, given in value.__arguments__.items())
        return ".".join([short() if short is not None else target.__name__, *arguments])
    if isinstance(value, Mapping):
        return "+".join(f"{key}-{_said(one)}" for key, one in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "+".join(map(_said, value)) or "empty"
    return str(value) or "empty"


def _short(name: str, longest: int) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= longest else f"{name[: longest - 9]}-{digest}"
