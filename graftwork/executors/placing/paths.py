"""The paths of a recipe, as a job sees them: it runs in another directory, maybe in a container."""

import os
from collections.abc import Iterator
from pathlib import Path

import fiddle as fdl
import nemo_run as run

from graftwork.cache import cache_directory
from graftwork.errors import ConfigError

READ = (
    "data", "data.train", "data.validation", "data.test", "data.predict", "data.tokenizer", "model.checkpoint",
    "base", "adapter", "file",
)  # fmt: skip
"""Fields that may name a file or directory to read, a recipe's or a verb's."""

WRITTEN = ("trainer.default_root_dir", "data.cache_dir", "output")
"""Fields that name what is written."""


def resolved(recipe: run.Partial, executor: run.Executor) -> run.Partial:
    """Return ``recipe`` with absolute paths where the job runs in a directory of its own; itself where it does not.

    Over ssh and in the cloud nothing of this machine is there: raises ConfigError for a relative path that the job
    would write to.
    """
    if isinstance(executor, run.LocalExecutor):
        return recipe
    near = isinstance(executor, run.DockerExecutor) or isinstance(getattr(executor, "tunnel", None), run.LocalTunnel)
    if not near:
        _refuse_relative(recipe)
        return recipe
    made = recipe.clone()
    for field, value in _values(recipe):
        owner, name = _place(made, field)
        paths = [str(_absolute(path)) if _is_here(field, path) else path for path in _each(value)]
        setattr(owner, name, paths if isinstance(value, list) else paths[0])
    return made


def mounts(recipe: run.Partial) -> list[str]:
    """Return the volumes that a container needs for a resolved recipe: what it reads, read-only, and what it writes."""
    found = list(_found(recipe))
    written = {_folder(field, path) for field, path in found if field in WRITTEN} | {cache_directory().absolute()}
    read = {path for field, path in found if field in READ} - written
    return [*(f"{path}:{path}:ro" for path in sorted(read)), *(f"{path}:{path}" for path in sorted(written))]


def _folder(field: str, path: Path) -> Path:
    return path.parent if field == "output" else path


def _found(recipe: run.Partial) -> Iterator[tuple[str, Path]]:
    """Yield the fields that name a path of this machine, and the path, absolute."""
    for field, value in _values(recipe):
        yield from ((field, _absolute(path)) for path in _each(value) if _is_here(field, path))


def _is_here(field: str, path: str) -> bool:
    return field in WRITTEN or Path(path).expanduser().exists()


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _each(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _values(recipe: run.Partial) -> Iterator[tuple[str, str | list[str]]]:
    """Yield the fields that name a path, or several."""
    for field in (*READ, *WRITTEN):
        owner, name = _place(recipe, field)
        value = getattr(owner, name, None) if isinstance(owner, fdl.Buildable) else None
        texts = value if isinstance(value, list) else [value]
        if value and all(isinstance(text, str) for text in texts):
            yield field, value


def _place(recipe: run.Partial, field: str) -> tuple[object, str]:
    part, _, name = field.rpartition(".")
    return (getattr(recipe, part, None) if part else recipe), name


def _refuse_relative(recipe: run.Partial) -> None:
    for field, value in _values(recipe):
        if field in WRITTEN and not _each(value)[0].startswith("/"):
            raise ConfigError(
                f"{field}={value!r} is relative, but the job runs on another machine: give an absolute path of a "
                "directory that all its nodes share."
            )
