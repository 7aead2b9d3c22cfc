"""What goes with what, read from what the tests are parametrized over: their cells, exports, merges, refusals."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from graftwork.errors import ParallelismError
from graftwork.layout import Layout
from graftwork.models.shapes import t5v11_small
from graftwork.peft import METHODS, PEFT
from tests.contracts import test_merging, test_pairs
from tests.contracts.methods import FAMILIES, STACKS, shape
from tests.exchange import (
    desk,
    test_combined_adapters,
    test_exchange_refusals,
    test_expert_adapters,
    test_expert_merges,
    test_merged_directory,
    test_peft_out,
    test_vllm_out,
)
from tests.helpers import tiny_t5
from tests.parallel.layouts import LAYOUTS, Cell, cells_of
from tests.parallel.models import LENDING, MIXTURE

KINDS = ("GPT", "experts", "T5")
SHAPES: dict[str, Callable[[], Any]] = {
    "GPT": lambda: shape(num_layers=4),
    "experts": lambda: replace(MIXTURE, num_layers=4),
    "T5": t5v11_small,
}
NO, UNTRIED = "refused", "-"
Marks = dict[str, set[str]]
"""Method -> kinds of models on which the tests show that something works."""


def kind_of(family: str) -> str:
    """Return the kind of a family of the tests."""
    experts = family == "mixture" or "moe" in family or family == "mixtral"
    return "T5" if family in tiny_t5.KINDS else "experts" if experts else "GPT"


def parametrized(test: Any, name: str) -> Iterable[Any]:
    """Return what a test is parametrized over by ``name``."""
    marks = [mark.args for mark in test.pytestmark if mark.name == "parametrize"]
    (values,) = [values for names, values, *_ in marks if name in (names, names[0])]
    return values


def families(values: Iterable[Any]) -> set[str]:
    """Return the kinds of the families of a fixture's parameters, slow ones too."""
    return {kind_of(getattr(value, "values", [value])[0]) for value in values}


def _marks(*found: tuple[Iterable[PEFT], set[str]]) -> Marks:
    marks: Marks = {}
    for transforms, kinds in found:
        for transform in transforms:
            marks.setdefault(type(transform).__name__, set()).update(kinds)
    return marks


def _flat(stacks: Iterable[Sequence[PEFT]]) -> list[PEFT]:
    return [transform for stack in stacks for transform in stack]


EVERY, MIXTURES = families(desk.EVERY), families(test_expert_adapters.FAMILIES)


def trained() -> Marks:
    """Return which methods are born, saved, loaded, paired and trained on which kinds of models."""
    pairs = {kind_of(kind) for kind in test_pairs.KINDS}
    assert {method for pair in test_pairs.PAIRS for method in pair} == set(METHODS)
    cells = {(kind_of(c.base), m) for name in LAYOUTS for c in cells_of(name) for m in methods_of(c)}
    return {method: pairs | {kind for kind, m in cells if m == method} for method in METHODS}


def merged() -> Marks:
    """Return which methods fold into which kinds of models."""
    live = _flat(STACKS[name]() for name in test_merging.MERGEABLE)
    files, experts = (_flat(test.METHODS.values()) for test in (test_merged_directory, test_expert_merges))
    return _marks((live, {kind_of(family) for family in FAMILIES}), (files, EVERY), (experts, MIXTURES))


def exported() -> Marks:
    """Return which methods go to Hugging Face PEFT and back, on which kinds of models."""
    return _marks((test_peft_out.METHODS.values(), EVERY), (test_expert_adapters.METHODS.values(), MIXTURES))


def served() -> Marks:
    """Return which methods are written for vLLM, on which kinds of models."""
    dense = [transform for transform, _ in parametrized(test_vllm_out.test_it_obeys_vllms_rules, "transform")]
    names = parametrized(test_expert_adapters.test_modules_are_named_as_published, "method")
    return _marks((dense, {"GPT"}), ([test_expert_adapters.METHODS[name] for name in names], MIXTURES))


def combined() -> Marks:
    """Return which methods are combined, on which kinds of models."""
    pairs = _flat((first, second) for first, second, *_ in test_combined_adapters.PAIRS.values())
    return _marks((pairs, EVERY))


COLUMNS: dict[str, tuple[Callable[[], Marks], str]] = {
    "trains on": (trained, ""),
    "merges into": (merged, "merging"),
    "PEFT, out and back": (exported, "PEFT"),
    "vLLM": (served, "vLLM"),
    "combines": (combined, "combining"),
}
"""What can be done with a method: where it is tested, and where its refusals are in ``refusals``."""


def methods_of(cell: Cell) -> set[str]:
    """Return the methods that a cell of the fidelity matrix trains."""
    stack = {**STACKS, **LENDING}.get(cell.subject)
    return {type(transform).__name__ for transform in stack()} if stack else set()


@cache
def support() -> dict[str, dict[str, str]]:
    """Return column -> kinds of models, for each method."""
    rows: dict[str, dict[str, str]] = {method: {} for method in METHODS}
    for column, (found, where) in COLUMNS.items():
        marks, barred = found(), {name for place, name in bars() if place == where}
        for method, row in rows.items():
            none = NO if method in barred else UNTRIED
            row[column] = ", ".join(kind for kind in KINDS if kind in marks.get(method, ())) or none
    return rows


def methods_table() -> str:
    """Return what each method can, on which kinds of models."""
    rows = [f"| `{method}` | {' | '.join(row.values())} |" for method, row in support().items()]
    return "\n".join([f"| method | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|", *rows])


def of_method(method: str) -> str:
    """Return one method's row, turned: what it can."""
    rows = [f"| {column} | {kinds} |" for column, kinds in support()[method].items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def layouts_table() -> str:
    """Return what is trained in each layout and compared with one process, by kind of model and of rows."""
    columns = [(kind, rows) for kind in KINDS for rows in ("whole", "packed", "routed") if _cells(kind, rows)]
    lines = [f"| layout | {' | '.join(f'{k}, {r}' if r != 'whole' else k for k, r in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, ranks in LAYOUTS.items():
        lines.append(f"| {ranks.title} | {' | '.join(_entry(name, *column) for column in columns)} |")
    return "\n".join(lines)


def _cells(kind: str, rows: str, layouts: Iterable[str] = LAYOUTS) -> list[Cell]:
    fits = {
        "whole": lambda c: not c.packed and not c.routed,
        "packed": lambda c: c.packed,
        "routed": lambda c: c.routed,
    }
    return [c for name in layouts for c in cells_of(name) if kind_of(c.base) == kind and fits[rows](c)]


def _entry(layout: str, kind: str, rows: str) -> str:
    if refused(layout, kind):
        return NO
    found = {method for cell in _cells(kind, rows, [layout]) for method in methods_of(cell)}
    return "every method" if found == set(METHODS) else ", ".join(f"`{m}`" for m in METHODS if m in found) or UNTRIED


def refused(layout: str, kind: str) -> bool:
    """Tell whether a layout cannot be of a model of this kind, as the layout itself says."""
    try:
        Layout.among(LAYOUTS[layout].sizes).check_shape(SHAPES[kind]())
    except ParallelismError:
        return True
    return False


def refusals() -> list[tuple[str, PEFT, str]]:
    """Return what is refused: where, which transform, and in a word which that is."""
    out = [
        ("vLLM" if options else "PEFT", transform, case)
        for case, (_, transform, options, _) in test_exchange_refusals.OUT.items()
        if options in ({}, {"for_": "vllm"}) and type(transform).__name__ in METHODS
    ]
    folded = [("merging", transform, case) for case, (_, transform, _) in test_merged_directory.UNMERGEABLE.items()]
    added = [
        ("combining", transform, "it is no sum of low-rank updates")
        for transform in test_combined_adapters.NO_SUMS.values()
    ]
    return [*out, *folded, *added]


def bars() -> set[tuple[str, str]]:
    """Return where which method is refused; what PEFT has no form for, vLLM does not serve either."""
    found = {(where, type(transform).__name__) for where, transform, _ in refusals()}
    return found | {("vLLM", name) for where, name in found if where == "PEFT"}


def repr_of(transform: PEFT) -> str:
    """Return the call that makes a transform, with what differs from its defaults and is no size."""
    usual = type(transform)().hyperparameters()
    sizes = ("dim", "virtual_tokens", "embedding_dim", "bottleneck_dim", "init")
    changed = {k: v for k, v in transform.hyperparameters().items() if v != usual[k] and k not in sizes}
    if transform.hyperparameters().get("dim", 0) > 512:
        changed = {"dim": transform.hyperparameters()["dim"]}
    return f"{type(transform).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"


def refusals_table() -> str:
    """Return what the tests show to be refused."""
    rows = [f"| {where} | `{repr_of(transform)}` | {which} |" for where, transform, which in refusals()]
    return "\n".join(["| where | what | which |", "|---|---|---|", *rows])
