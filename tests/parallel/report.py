"""Writes the tables of docs/parallelism.md from the last run of the matrix: `python -m tests.parallel.report`.

The figures are those that `pytest tests/parallel/test_fidelity.py` has left in pytest's cache.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.parallel.layouts import LAYOUTS, PRODUCTS, SUBJECTS, TITLES, Cell, cells_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "parallelism.md"
CACHE_KEY = "graftwork/parallelism"
CACHE = ROOT / ".pytest_cache" / "v" / CACHE_KEY
START, END = "<!-- matrix: written by python -m tests.parallel.report -->", "<!-- end of matrix -->"
Figure = Callable[[str, Cell], str]
MODELS = {
    "llama": "Llama",
    "gpt2": "GPT-2: learned positions, tied embeddings",
    "qwen3": "Qwen3: norms of queries and keys",
    "mixture": "experts",
    "qwen2_moe_every_other": "Qwen2-MoE: experts, a shared one, layers without",
    "t5": "T5: tied embeddings, relu",
    "mt5": "mT5: untied, gated",
}


def main() -> None:
    """Rewrite the section between the markers."""
    stored = json.loads(CACHE.read_text())
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + section(lambda layout, cell: _worst(stored[f"{layout}/{cell}"])) + after)


def section(figure: Figure) -> str:
    """Return the tables, markers included; ``figure`` gives the text of a cell."""
    parts = [START, _table(_methods(), "method", figure), _table(_specials(), "and also", figure), _products(figure)]
    return "\n\n".join([*parts, END])


def blank(text: str) -> str:
    """Return the section of a page with every figure replaced, to compare what two pages list."""
    return re.sub(r"\d(\.\d)?e-\d\d|\b0\b", "·", text.partition(START)[2].partition(END)[0])


def _methods() -> dict[str, dict[str, Cell]]:
    """Method -> layout -> cell; a layout with experts trains the model with experts."""
    rows: dict[str, dict[str, Cell]] = {title: {} for title in SUBJECTS.values()}
    for layout in _main():
        for cell in cells_of(layout):
            if _plain(layout, cell):
                rows[SUBJECTS[cell.subject]][layout] = cell
    return rows


def _plain(layout: str, cell: Cell) -> bool:
    """Tell whether a cell trains a method of the first table on the layout's usual model."""
    return cell.subject in SUBJECTS and cell == Cell("mixture" if layout == "ep2" else "llama", cell.subject)


def _specials() -> dict[str, dict[str, Cell]]:
    rows: dict[str, dict[str, Cell]] = {}
    for layout in _main():
        for cell in cells_of(layout):
            if not _plain(layout, cell):
                rows.setdefault(_describe(cell), {})[layout] = cell
    return rows


def _products(figure: Figure) -> str:
    lines = ["| layout | model | full fine-tuning | one of every method |", "|---|---|---|---|"]
    for layout in PRODUCTS:
        trained = cells_of(layout)
        for full, every in zip(trained[::2], trained[1::2], strict=True):
            cells = [LAYOUTS[layout].title, _trained(full), figure(layout, full), figure(layout, every)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(rows: dict[str, dict[str, Cell]], corner: str, figure: Figure) -> str:
    layouts = [name for name in _main() if any(name in cells for cells in rows.values())]
    lines = [_line([corner, *(LAYOUTS[name].title for name in layouts)]), _line(["---"] * (len(layouts) + 1))]
    for title, cells in rows.items():
        lines.append(_line([title, *(figure(n, cells[n]) if n in cells else "" for n in layouts)]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _main() -> list[str]:
    return [name for name in LAYOUTS if name not in PRODUCTS]


def _describe(cell: Cell) -> str:
    return f"{_trained(cell)}: {TITLES[cell.subject]}"


def _trained(cell: Cell) -> str:
    """Name the model of a cell and what is special about its rows."""
    extra = [word for word in ("packed", "routed") if getattr(cell, word)]
    extra += [f"recompute={cell.recompute}"] if cell.recompute else []
    return ", ".join([MODELS[cell.base], *extra])


def _worst(figures: dict[str, float]) -> str:
    """Return the largest figure, two digits up."""
    worst = max(figures.values())
    return f"{worst:.1e}" if worst else "0"


if __name__ == "__main__":
    main()
