"""Recipe files are data: what would make NeMo Run import or call something is checked before it reads the file.

NeMo Run imports ``_target_``, calls what a dotted value names and evaluates lambdas and ternaries. A file may come from
a stranger: it may name the parts of a recipe, and nothing else, unless ``GRAFTWORK_TRUST_RECIPES=1`` trusts it.
"""

import ast
import importlib.util
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import yaml
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers

from graftwork.data import SFTDataModule
from graftwork.data.files import READERS
from graftwork.errors import ConfigError, quoted, suggest
from graftwork.executors import EXECUTORS
from graftwork.inference import evaluate, generate
from graftwork.jsonfile import MAX_DEPTH, parse_json, read_bytes
from graftwork.models import MODELS, shapes
from graftwork.optim import AdamW
from graftwork.peft import METHODS
from graftwork.recipes import RECIPES
from graftwork.training import MegatronStrategy, callbacks, finetune

TRUST = "GRAFTWORK_TRUST_RECIPES"
"""The environment variable that lets recipe files name any code."""

MAX_BYTES = 2**20
"""Largest recipe file."""

MOST_VALUES = 1000
"""Most values of a recipe file: NeMo Run takes long over many."""

_FILE = re.compile(r"@?(.+?\.(?:yaml|yml|json|toml))(?::\w+)?", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z_][\w.\[\]]*([*+-]?=)?")
_CALL = re.compile(r"[\w.]+\(.*\)", re.DOTALL)
_FACTORY = re.compile(r"(\w+)(?:\((.*)\))?", re.DOTALL)
_CODE = (ast.Lambda, ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Call, ast.JoinedStr)


def check_recipe_files(given: str | None, factory: object, args: list[str]) -> None:
    """Check the file of ``--yaml``, of ``--factory @FILE`` and of every ``FIELD=@FILE``; raises ConfigError."""
    if os.environ.get(TRUST) == "1":
        return
    if isinstance(factory, str) and factory.startswith("@"):
        # NeMo Run would drop what the recipe says of every part that the file mentions.
        raise ConfigError("--factory takes the name of a recipe; give a file of its fields with --yaml FILE beside it.")
    values = [value for arg in args for value in [arg.partition("=")[2].strip()] if value.startswith("@")]
    for name in [*([given] if given else []), *values]:
        if found := _FILE.fullmatch(name):
            check_recipe_file(Path(found[1]), whole=name == given)
        else:
            raise ConfigError(f"{quoted(name)} is no recipe file; valid: one that ends in .yaml, .yml, .json or .toml.")


def check_recipe_file(path: Path, whole: bool = True) -> None:
    """Raise ConfigError when a recipe file is damaged, or says more than names and values of the parts of a recipe.

    A ``whole`` file holds fields of a recipe that is named beside it, any other one those of one part.
    """
    data = read_bytes(path, ConfigError, MAX_BYTES)
    reader = _READERS[path.suffix.lower()]
    try:
        document = reader(data, repr(str(path)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{quoted(path)} cannot be read: {quoted(' '.join(str(error).split()), bare=True)}."
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{quoted(path)} holds no recipe; a mapping of fields is valid.")
    if whole and (own := document.keys() & {"_target_", "_partial_", "_factory_", "run"}):
        raise ConfigError(
            f"{quoted(path)} has {min(own)!r}, but a file holds fields only; name the recipe with --factory beside it "
            "(what --to-yaml writes is a record to read)."
        )
    for number, (where, key, value) in enumerate(_walk(document, "", MAX_DEPTH, path)):
        if number == MOST_VALUES:
            raise _too_many(quoted(path))
        if reason := _refusal(key, value):
            raise ConfigError(f"{quoted(path)}, {quoted(where, bare=True)}: {reason}")


def targets() -> frozenset[str]:
    """Return what ``_target_`` may name: the parts of a recipe, callbacks, two loggers, the verbs."""
    named: list[Callable[..., object]] = [
        SFTDataModule,
        *MODELS.values(),
        AdamW,
        MegatronStrategy,
        pl.Trainer,
        finetune,
        generate,
        evaluate,
    ]
    for room in (shapes, callbacks, lightning_callbacks):
        named += [one for name in room.__all__ if callable(one := getattr(room, name))]
    named += [lightning_loggers.CSVLogger, lightning_loggers.TensorBoardLogger, *METHODS.values()]
    return frozenset(f"{one.__module__}.{one.__qualname__}" for one in named)


def _too_many(what: str) -> ConfigError:
    return ConfigError(f"{what} holds more than {MOST_VALUES:,} values; no recipe has so many.")


def _read_yaml(data: bytes, what: str) -> object:
    text = data.decode("utf-8")
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if number > 4 * MOST_VALUES:  # a key and a value, or a list's begin and end
            raise _too_many(what)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{what} is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"{what} has an alias (*{quoted(event.anchor, bare=True)}); write the value where it is used."
            )
    value: object = yaml.load(text, Loader=_Unique)
    return value


def _read_toml(data: bytes, what: str) -> object:
    return tomllib.loads(data.decode("utf-8"))


def _read_json(data: bytes, what: str) -> object:
    return parse_json(data, what, ConfigError)


_READERS: dict[str, Callable[[bytes, str], object]] = {
    ".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json, ".toml": _read_toml,
}  # fmt: skip


class _Unique(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML says it is an error, PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Return the mapping of a node."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ConfigError(f"the key {quoted(twice[0])} is given twice in a recipe file.")
        made: dict[object, object] = super().construct_mapping(node, deep=deep)
        return made


def _walk(value: object, where: str, levels: int, path: Path) -> Iterator[tuple[str, object, object]]:
    """Yield (where, key, value) of every place of a document; the key is None inside a list."""
    if levels == 0:
        raise ConfigError(f"{quoted(path)} is nested deeper than {MAX_DEPTH} levels.")
    items = (
        value.items() if isinstance(value, dict) else ((None, one) for one in value) if isinstance(value, list) else ()
    )
    for key, inner in items:
        place = f"{where}.{key}".strip(".") if key is not None else where
        yield place, key, inner
        yield from _walk(inner, place, levels - 1, path)


def _refusal(key: object, value: object) -> str:
    """Return why one entry of a recipe file is refused, or ''."""
    if key is not None and not (isinstance(key, str) and _KEY.fullmatch(key)):
        return f"{quoted(key)} is no name of a field."
    if key == "_target_":
        known = isinstance(value, str) and value.removesuffix("()") in _known()
        return (
            ""
            if known
            else f"_target_ {quoted(value)} is no part of a recipe; {suggest(str(value), _known())} {_TRUSTED}"
        )
    if key is None and isinstance(value, dict):
        return "a list of mappings cannot be read; write its items as text, peft: '[lora(dim=16), ptuning]'."
    if key == "_factory_":
        return "" if _is_factory(value) else f"{quoted(value)} is no name of a factory. {_TRUSTED}"
    if not isinstance(value, str):
        return ""
    if value.startswith("@") or "${" in value:
        return f"{quoted(value)} refers to something outside of the file; write the value itself."
    return f"{quoted(value)} names code. {_TRUSTED}" if names_code(value) else ""


_TRUSTED = f"If the file is yours, {TRUST}=1 allows it."


def _known() -> frozenset[str]:
    # golden texts name a method by its room, files written by --to-yaml by its file
    return targets() | {f"graftwork.peft.{m.__module__.rpartition('.')[2]}.{m.__name__}" for m in METHODS.values()}


def _is_factory(value: object) -> bool:
    found = _FACTORY.fullmatch(value) if isinstance(value, str) else None
    return (
        found is not None and not names_code(found[2] or "") and not any(names_code(a) for a in _values(found[2] or ""))
    )


def _values(arguments: str) -> list[str]:
    return [argument.partition("=")[2] for argument in arguments.split(",")]


def names_code(text: str) -> bool:
    """Whether NeMo Run, given ``text`` as a value, could import, call or evaluate something."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return _CALL.fullmatch(text.strip()) is not None or "lambda" in text.split()
    is_path = isinstance(tree.body, ast.BinOp)  # runs/os.path is no dotted name
    return any(
        (isinstance(node, _CODE) and not _is_registered(node)) or (not is_path and _is_importable(node))
        for node in ast.walk(tree)
    )


def _is_registered(node: ast.AST) -> bool:
    """Whether a call is that of a method, recipe or executor by its name: NeMo Run looks it up, and imports nothing."""
    names = {*RECIPES, *EXECUTORS, *(method.short_name() for method in METHODS.values())}
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _is_importable(node: ast.AST) -> bool:
    if not isinstance(node, ast.Attribute) or f".{node.attr}" in READERS:  # test.jsonl is a file
        return False
    root: ast.AST = node
    while isinstance(root, ast.Attribute):
        root = root.value
    if not isinstance(root, ast.Name):
        return True
    return root.id in sys.modules or importlib.util.find_spec(root.id) is not None
