"""Tables for the terminal: figures before and after, and answers side by side."""

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from graftwork.inference.metrics import KINDS, LabelFigures, Metrics
from graftwork.models.generation.answers import Answer

WIDTH = 80


def compare(before: Metrics, after: Metrics, names: tuple[str, str] = ("base", "adapted"), width: int = WIDTH) -> str:
    """Return a table of two evaluations of the same rows, as ``evaluate_model`` makes them, and one for each kind."""
    titled = [(f"{after['rows']} held-out rows", before, after)]
    for kind in KINDS:
        for name, figures in after.get(kind, {}).items():
            if name in before.get(kind, {}):
                titled.append((f"{kind[:-1]} {name!r}: {figures['rows']} rows", before[kind][name], figures))
    return as_text([_compared(title, old, new, names) for title, old, new in titled], width)


def _compared(title: str, before: Metrics, after: Metrics, names: tuple[str, str]) -> Table:
    made = table(title, ["", *names, "change"], right=[1, 2, 3])
    made.add_row("loss per answer token", *_numbers(before["loss"], after["loss"]))
    made.add_row("exact match", *_percents(before["exact_match"], after["exact_match"]))
    if "accuracy" in before and "accuracy" in after:
        ways = len(after["labels"])
        made.add_row(f"accuracy, {ways}-way", *_percents(before["accuracy"], after["accuracy"]))
        for label, figures in after["labels"].items():
            old = _recall(before["labels"].get(label))
            made.add_row(f"  {label!r} ({figures['rows']} rows)", *_percents(old, figures["recall"]))
    return made


def confusion(metrics: Metrics, width: int = WIDTH) -> str:
    """Return the table of expected (rows) against predicted (columns) labels."""
    labels = list(metrics["confusion"])
    made = table("expected (down) and predicted", ["", *labels], right=range(1, len(labels) + 1))
    for label, row in metrics["confusion"].items():
        made.add_row(label, *(str(row[other]) for other in labels))
    return as_text([made], width)


def side_by_side(
    before: Sequence[Answer],
    after: Sequence[Answer],
    names: tuple[str, str] = ("base", "adapted"),
    width: int = WIDTH,
) -> str:
    """Return a table of two models' answers to the same inputs, as made by ``sample_answers``."""
    known = any("expected" in row for row in after)
    made = table(None, ["input", *(["expected"] if known else []), *names], lines=True)
    for old, new in zip(before, after, strict=True):
        mark = "" if new.get("expected") is None else " ✓" if new["output"] == new["expected"] else " ✗"
        right = [_shown(new.get("expected") or "", 60)] if known else []
        made.add_row(_shown(new["input"], 120), *right, _shown(old["output"], 90), _shown(new["output"], 90) + mark)
    return as_text([made], width)


def table(title: str | None, columns: Sequence[str], right: Iterable[int] = (), lines: bool = False) -> Table:
    """Return an empty table for the terminal; the columns with the numbers ``right`` are aligned there."""
    made = Table(title=title, box=box.SIMPLE_HEAD, show_lines=lines, title_justify="left", pad_edge=False)
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number in right else "left", overflow="fold")
    return made


def as_text(tables: Sequence[Table], width: int = WIDTH) -> str:
    """Return tables as lines of at most ``width`` characters, without colours."""
    written = io.StringIO()
    console = Console(file=written, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    for one in tables:
        console.print(one)
    lines = written.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"


def _recall(figures: LabelFigures | None) -> float | None:
    return None if figures is None else figures["recall"]


def _numbers(old: float, new: float) -> tuple[str, str, str]:
    return f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}"


def _percents(old: float | None, new: float | None) -> tuple[str, str, str]:
    change = "" if old is None or new is None else f"{100 * (new - old):+.1f}"
    return _percent(old), _percent(new), change


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _shown(text: str, most: int) -> str:
    """One line of at most ``most`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1].rstrip() + "…"
