"""A recipe on disk: every field that was set, as plain data. Reading one calls nothing but its own parts."""

import ast
import re
from pathlib import Path

import nemo_run as run
import yaml

from graftwork.atomic import atomic_write_text
from graftwork.errors import ArtifactError, ConfigError, quoted
from graftwork.jsonfile import read_object
from graftwork.peft.artifact.directory import CONFIG
from graftwork.recipes.document import places, read_document
from graftwork.recipes.plain import TARGET, Reader, Writer

_LINE = re.compile(r"([\w.\[\]]+) = (.*)")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)+")


def save(recipe: run.Partial, path: str | Path) -> Path:
    """Write ``recipe`` to a YAML file that ``load`` reads back as an equal recipe; return the path.

    Raises ConfigError for a value that is no plain data, naming its field, and for a file that is no ``.yaml``.
    """
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"{quoted(path)} is no YAML file; name it {quoted(path.with_suffix('.yaml').name)}.")
    document = Writer().plain("", recipe)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    atomic_write_text(path, f"# nemorun graft finetune --file {path.name} [FIELD=VALUE ...] --yes\n{text}")
    return path


def load(path: str | Path) -> run.Partial:
    """Return the recipe of a file that ``save`` wrote; raises ConfigError for anything else.

    Only parts of a recipe may be named: a file may come from a stranger (``recipes.allowed``).
    """
    path = Path(path)
    document = read_document(path)
    for _ in places(document, path):
        pass  # within its limits
    if TARGET not in document:
        raise ConfigError(
            f"{quoted(path)} names no {TARGET}: it holds fields only; give it with --yaml beside --factory."
        )
    return Reader(str(path)).recipe(document)


def from_adapter(directory: str | Path) -> run.Partial:
    """Return the recipe that an adapter was trained by; raises ArtifactError when it does not tell."""
    path = Path(directory) / CONFIG
    text = read_object(path, ArtifactError).get("recipe")
    if not isinstance(text, str):
        raise ArtifactError(f"{quoted(path)} tells no recipe: the adapter was trained by plain Python.")
    return from_text(text, str(path))


def from_text(text: str, where: str = "the recipe's text") -> run.Partial:
    """Return the recipe whose canonical text (``recipes.show``) is ``text``; raises ConfigError for a broken line.

    The text says the defaults of our own parts too, so those are set in what is returned.
    """
    root: dict[object, object] = {}
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            raise ConfigError(f"{where}: {quoted(line)} is no line of a recipe; valid: FIELD = VALUE.")
        name, value = found.groups()
        if name == "recipe":
            root[TARGET] = value
        else:
            _set(root, name, _literal(value, f"{where}, {name}"), where)
    return Reader(where).recipe(root)


def _literal(text: str, where: str) -> object:
    if _DOTTED.fullmatch(text):
        return {TARGET: text}
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ConfigError(f"{where}: {quoted(text)} is no plain value; it cannot be read back.") from error


def _set(root: dict[object, object], name: str, value: object, where: str) -> None:
    """Put ``value`` at a path such as ``peft[0].dim``; an item of a list stands right behind the one before it."""
    keys = re.findall(r"\w+", name)
    place: object = root
    for key in keys[:-1]:
        place = _below(place, key)
    last = keys[-1]
    if (isinstance(place, dict) and name.endswith("[0]")) or isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list) and last.isdigit() and int(last) == len(place):
        place.append(value)
    else:
        raise ConfigError(f"{where}: {quoted(name)} stands at no place of the recipe.")


def _below(place: object, key: str) -> object:
    if isinstance(place, dict):
        return place.setdefault(key, [])
    return place[int(key)] if isinstance(place, list) and key.isdigit() and int(key) < len(place) else None
