"""Recipe files are data: what would make NeMo Run import or call something is checked before it reads the file.

NeMo Run imports ``_target_``, calls what a dotted value names and evaluates lambdas and ternaries. A file may come from
a stranger: it may name the parts of a recipe, and nothing else, unless ``GRAFTWORK_TRUST_RECIPES=1`` trusts it.
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path

from graftwork.data.files import is_data
from graftwork.errors import ConfigError, quoted, suggest
from graftwork.executors import EXECUTORS
from graftwork.peft import METHODS
from graftwork.recipes import AUTO, RECIPES
from graftwork.recipes.allowed import TRUSTED, targets, trusting
from graftwork.recipes.document import places, read_document

_FILE = re.compile(r"@?(.+?\.(?:yaml|yml|json|toml))(?::\w+)?", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z_][\w.\[\]]*([*+-]?=)?")
_CALL = re.compile(r"[\w.]+\(.*\)", re.DOTALL)
_FACTORY = re.compile(r"(\w+)(?:\((.*)\))?", re.DOTALL)
_CODE = (ast.Lambda, ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Call, ast.JoinedStr)


def check_recipe_files(given: str | None, factory: object, args: list[str]) -> None:
    """Check the file of ``--yaml``, of ``--factory @FILE`` and of every ``FIELD=@FILE``; raises ConfigError."""
    if trusting():
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
    document = read_document(path)
    if whole and (own := [key for key in ("_factory_", "_partial_", "_target_", "run") if key in document]):
        raise ConfigError(
            f"{quoted(path)} has {own[0]!r}, but a file of --yaml holds fields only; name the recipe with --factory "
            "beside it, or run a file that recipes.save wrote with --file."
        )
    for where, key, value in places(document, path):
        if reason := _refusal(key, value):
            raise ConfigError(f"{quoted(path)}, {quoted(where, bare=True)}: {reason}")


def _refusal(key: object, value: object) -> str:
    """Return why one entry of a recipe file is refused, or ''."""
    if key is not None and not (isinstance(key, str) and _KEY.fullmatch(key)):
        return f"{quoted(key)} is no name of a field."
    if key == "_target_":
        known = targets()
        if isinstance(value, str) and value.removesuffix("()") in known:
            return ""
        return f"_target_ {quoted(value)} is no part of a recipe; {suggest(str(value), known)} {TRUSTED}"
    if key is None and isinstance(value, dict):
        return "a list of mappings cannot be read; write its items as text, peft: '[lora(dim=16), ptuning]'."
    if key == "_factory_":
        return "" if _is_factory(value) else f"{quoted(value)} is no name of a factory. {TRUSTED}"
    if not isinstance(value, str):
        return ""
    if value.startswith("@") or "${" in value:
        return f"{quoted(value)} refers to something outside of the file; write the value itself."
    return f"{quoted(value)} names code. {TRUSTED}" if names_code(value) else ""


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
    names = {*RECIPES, AUTO, *EXECUTORS, *(method.short_name() for method in METHODS.values())}
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _is_importable(node: ast.AST) -> bool:
    if not isinstance(node, ast.Attribute) or _is_file(node):  # test.jsonl, and test.jsonl.gz
        return False
    root: ast.AST = node
    while isinstance(root, ast.Attribute):
        root = root.value
    if not isinstance(root, ast.Name):
        return True
    return root.id in sys.modules or importlib.util.find_spec(root.id) is not None


def _is_file(node: ast.Attribute) -> bool:
    return is_data(Path(ast.unparse(node)))
