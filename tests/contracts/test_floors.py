"""What an import costs and what the source may not contain; the floors themselves are import-linter's contract."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "graftwork").rglob("*.py"))
CONFIG_LIBRARIES = {"nemo_run", "fiddle"}
LONGEST, MEDIAN = 45, 10
"""Lines of a function."""
UNTYPED, IGNORES = 15, 20
"""Times ``Any`` per thousand lines; ``type: ignore`` comments in all."""
HEAVY = {"torch", "lightning", "megatron", "transformers", "datasets", "numpy", *CONFIG_LIBRARIES}


def loaded(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_the_package_alone_imports_nothing_heavy() -> None:
    assert (
        not loaded("import graftwork, graftwork.errors, graftwork.virtual_tokens, graftwork.atomic, graftwork.layout")
        & HEAVY
    )


def test_library_floors_work_without_config_libraries() -> None:
    modules = loaded("import graftwork.peft, graftwork.models, graftwork.data, graftwork.training, graftwork.inference")
    assert "megatron" in modules and not modules & CONFIG_LIBRARIES


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_small_functions_docstrings_and_annotations_that_are_types(source: Path) -> None:
    text = source.read_text()
    tree = ast.parse(text)
    long = {f.name: n for f in functions(tree) if (n := f.end_lineno - f.lineno + 1) > LONGEST}  # type: ignore[operator]
    assert not long, f"functions of more than {LONGEST} lines"
    assert not list(undocumented(tree, source.stem)), "public names without a docstring"
    assert "from __future__ import annotations" not in text, "NeMo Run's overrides need annotations that are types"
    assert not re.search(r"except\s*:|except (Base)?Exception\b(?! as error:\n(.*\n){1,8}?\s+raise)", text)
    assert not re.search(r"\bTODO\b|\bFIXME\b|NotImplementedError", text)


def test_functions_are_short_and_types_say_something() -> None:
    texts = [source.read_text() for source in SOURCES]
    lengths = [f.end_lineno - f.lineno + 1 for text in texts for f in functions(ast.parse(text))]  # type: ignore[operator]
    assert statistics.median(lengths) <= MEDIAN
    lines = sum(text.count("\n") for text in texts)
    untyped = sum(len(re.findall(r"\bAny\b", text)) for text in texts)
    assert 1000 * untyped / lines <= UNTYPED, f"{untyped} times Any in {lines} lines"
    assert sum(text.count("type: ignore") for text in texts) <= IGNORES


def test_no_import_circle_anywhere() -> None:
    """Neither between rooms nor inside one; imports inside functions and under TYPE_CHECKING count too."""
    assert circles(imports_of(SOURCES)) == []


def test_a_circle_would_be_found() -> None:
    """Deliberate break."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Return every function and method."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def undocumented(node: ast.AST, name: str) -> Iterator[str]:
    """Yield the public modules, classes, functions, methods and properties without a docstring."""
    if not ast.get_docstring(node):  # type: ignore[arg-type]
        yield name
    if isinstance(node, ast.FunctionDef):
        return
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef)
        # ``x.setter`` repeats a documented property; ``overload`` a documented function.
        repeats = named and any(ast.unparse(d).endswith((".setter", "overload")) for d in child.decorator_list)
        if named and not child.name.startswith("_") and not repeats:
            yield from undocumented(child, f"{name}.{child.name}")


def imports_of(sources: list[Path]) -> dict[str, set[str]]:
    """Return which of graftwork's modules each module imports, by dotted name (``x.y`` for a package ``x/y``)."""
    modules = {dotted(source) for source in sources}
    graph: dict[str, set[str]] = {}
    for source in sources:
        found: set[str] = set()
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {inner if (inner := f"{node.module}.{a.name}") in modules else node.module for a in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[dotted(source)] = found & modules
    return graph


def dotted(source: Path) -> str:
    """Return a source file's module name."""
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other."""
    reach = {start: closure(graph, start) for start in graph}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return sorted(map(list, groups))


def closure(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return every module that ``start`` imports, directly or not."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (module := waiting.pop()) not in seen:
            seen.add(module)
            waiting += graph.get(module, ())
    return seen
