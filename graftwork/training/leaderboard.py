"""Runs beside each other: a leaderboard of their results, and of what their recipes differ in."""

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from pydantic import BaseModel

from graftwork.atomic import atomic_write_bytes, atomic_write_text
from graftwork.errors import CheckpointError, ConfigError, GraftworkError, quoted, suggest
from graftwork.inference.compare import as_text, table
from graftwork.jsonfile import read_object, read_schema
from graftwork.peft.artifact.directory import CONFIG
from graftwork.training.comparison_page import page
from graftwork.training.plot import Curve, Points, loss_curves
from graftwork.training.run_directory import CHECKPOINTS, latest, states
from graftwork.training.state.checkpoint import STATE, Facts

SUMMARY = "summary.json"
MARKS = (SUMMARY, CHECKPOINTS, "logs", "adapter", "model")
"""What tells a run's directory: one of these is in it."""

OWN_FIELDS = ("recipe", "trainer.default_root_dir")
"""Lines of a recipe's text in which runs differ anyway."""

MOST_COLUMNS = 4
"""Most fields of recipes that the table has columns for."""

MOST_ROWS = 2_000_000
"""Most lines of a log that are read."""

OUTPUTS = (".html", ".png")


class _Summary(BaseModel):
    steps: int
    train_loss: Optional[float] = None
    val_loss: Optional[float] = None
    metrics: dict[str, dict[str, float]] = {}
    tokens_per_second: float = 0.0
    trainable_parameters: int = 0


@dataclass(frozen=True)
class Run:
    """What the directory of a run tells; ``metrics`` hold the values after training, losses are per answer token.

    An unfinished run has no summary: its losses are those of its logs so far. ``recipe``: the lines of its recipe's
    text by path, empty where nothing tells it.
    """

    directory: Path
    name: str
    finished: bool
    steps: int
    val_loss: float | None
    train_loss: float | None
    metrics: Mapping[str, float]
    tokens_per_second: float | None
    trainable_parameters: int | None
    recipe: Mapping[str, str]
    curve: Curve

    @property
    def state(self) -> str:
        """How far it is, in words."""
        return "finished" if self.finished else f"unfinished, state at step {self.steps}" if self.steps else "no state"


def compare(directories: list[str], output: Optional[str] = None, sort: str = "val_loss") -> None:
    """Print a leaderboard of runs, best first, and write their loss curves.

    Args:
        directories: Run directories, or directories that hold some.
        output: File that ends in .html (a page of its own, table and curves) or .png.
        sort: val_loss, train_loss, tokens_per_second, trainable_parameters or the name of a metric.

    Raises:
        ConfigError: for a directory without runs, and for a ``sort`` or an ``output`` that cannot be.
    """
    if output is not None and Path(output).suffix not in OUTPUTS:
        raise ConfigError(f"output={quoted(output)} ends in neither of {' and '.join(OUTPUTS)}.")
    runs = ranked(read_runs(directories), sort)
    print(leaderboard(runs), end="", flush=True)
    if output is None:
        return
    losses = [run.curve for run in runs]
    if output.endswith(".png"):
        atomic_write_bytes(output, loss_curves(losses))
    else:
        atomic_write_text(output, page(*cells(runs, differing(runs)), losses))
    print(f"\nwritten: {output}", flush=True)


def read_runs(directories: Sequence[str]) -> list[Run]:
    """Return every run that ``directories`` are, or hold one level below; raises ConfigError for one without."""
    found = [path for directory in directories for path in _runs_of(Path(directory))]
    paths = list({path.resolve(): path for path in found}.values())
    if not paths:
        raise ConfigError("no directory is named; give the directories of the runs to compare.")
    base = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    return [_read(path, str(path.resolve().relative_to(base))) for path in paths]


def ranked(runs: Sequence[Run], sort: str = "val_loss") -> list[Run]:
    """Return the runs, best first: the least loss or size, the largest metric or speed; those without it come last."""
    figures = ("val_loss", "train_loss", "tokens_per_second", "trainable_parameters")
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    if sort not in (*figures, *metrics):
        raise ConfigError(f"sort={quoted(sort)} is no figure of these runs; {suggest(sort, [*figures, *metrics])}")
    sign = 1 if sort.endswith(("loss", "parameters", "perplexity")) else -1

    def key(run: Run) -> tuple[bool, float]:
        value = run.metrics.get(sort) if sort in metrics else getattr(run, sort)
        return (value is None, sign * value if value is not None else 0.0)

    return sorted(runs, key=key)


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the fields in which the recipes differ, in the order of their text."""
    fields = dict.fromkeys(path for run in runs for path in run.recipe if path not in OWN_FIELDS)
    told = [run.recipe for run in runs if run.recipe]
    return [path for path in fields if len({recipe.get(path) for recipe in told}) > 1]


def leaderboard(runs: Sequence[Run]) -> str:
    """Return the table for the terminal, best first, and below it what each recipe changes against the first."""
    fields = differing(runs)
    columns, rows = cells(runs, fields[:MOST_COLUMNS])
    made = table(None, columns, right=range(2, len(columns) - 1))
    for row in rows:
        made.add_row(*row)
    width = sum(max(len(line[i]) for line in [columns, *rows]) + 4 for i in range(len(columns)))
    left_out = fields[MOST_COLUMNS:]
    more = f"\n{len(left_out)} more fields differ; against {runs[0].name}:\n" if left_out else ""
    return as_text([made], max(width, 80)) + more + "".join(f"{line}\n" for line in _changes(runs) if left_out)


def cells(runs: Sequence[Run], fields: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and the rows of text: figures, then the values of ``fields``, then the state."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    columns = ["", "run", *metrics, "val loss", "train loss", "trainable", "tokens/s", "steps", *fields, ""]
    rows = [
        [
            f"{place}",
            run.name,
            *(_number(run.metrics.get(name), "{:.4g}") for name in metrics),
            _number(run.val_loss, "{:.4f}"),
            _number(run.train_loss, "{:.4f}"),
            _number(run.trainable_parameters, "{:,}"),
            _number(run.tokens_per_second, "{:,.0f}"),
            f"{run.steps:,}",
            *(run.recipe.get(field, "-") for field in fields),
            "" if run.finished else run.state,
        ]
        for place, run in enumerate(runs, 1)
    ]
    return columns, rows


def _changes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield, run by run, the lines that its recipe has otherwise than the first."""
    first = runs[0].recipe
    for run in runs[1:]:
        yield f"  {run.name}" if run.recipe else f"  {run.name}: its recipe is not told"
        for path in differing([runs[0], run]):
            yield f"    {path}: {first.get(path, 'absent')} -> {run.recipe.get(path, 'absent')}"


def _runs_of(directory: Path) -> list[Path]:
    if not directory.is_dir():
        beside = [p.name for p in directory.parent.iterdir() if p.is_dir()] if directory.parent.is_dir() else []
        raise ConfigError(f"there is no directory {quoted(directory)}; {suggest(directory.name, beside)}")
    if _is_run(directory):
        return [directory]
    found = sorted(path for path in directory.iterdir() if path.is_dir() and _is_run(path))
    if not found:
        raise ConfigError(f"{quoted(directory)} is no run and holds none: neither has any of {', '.join(MARKS)}.")
    return found


def _is_run(directory: Path) -> bool:
    return any((directory / mark).exists() for mark in MARKS)


def _read(directory: Path, name: str) -> Run:
    reached = max((int(state.name.rpartition("-")[2]) for state in states(directory)), default=0)
    train, validation = _curves(directory)
    where, curve = (directory, name), Curve(name, train, validation)
    summary = read_schema(directory / SUMMARY, _Summary, CheckpointError) if (directory / SUMMARY).exists() else None
    if summary is None or reached > summary.steps:
        best = min((loss for _, loss in validation), default=None)
        last = train[-1][1] if train else None
        return Run(*where, False, reached, best, last, {}, None, None, _recipe(directory), curve)
    after = {metric: values["after"] for metric, values in summary.metrics.items() if "after" in values}
    losses, speed = (summary.val_loss, summary.train_loss), summary.tokens_per_second
    size = summary.trainable_parameters
    return Run(*where, True, summary.steps, *losses, after, speed, size, _recipe(directory), curve)


def _recipe(directory: Path) -> dict[str, str]:
    """Return the lines of the recipe's text, as the adapter or the newest training state remembers it."""
    text = _told(directory)
    lines = (line.partition(" = ") for line in (text or "").splitlines())
    return {path: value for path, sign, value in lines if sign}


def _told(directory: Path) -> str | None:
    try:
        if (directory / "adapter" / CONFIG).is_file():
            text = read_object(directory / "adapter" / CONFIG, CheckpointError).get("recipe")
            if isinstance(text, str):
                return text
        if (state := latest(directory)) is not None:
            identity = read_schema(state / STATE, Facts, CheckpointError).identity
            return identity.recipe if identity is not None else None
    except GraftworkError:
        return None  # a table of results needs no recipe
    return None


def _curves(directory: Path) -> tuple[Points, Points]:
    """Return (step, loss) of training and validation from the logs of every start; a later start wins."""
    train: dict[int, float] = {}
    validation: dict[int, float] = {}
    for file in sorted(directory.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:] or 0)):
        for step, row in _rows(file):
            for curve, column in ((train, "train_loss"), (validation, "val_loss")):
                if (loss := _loss(row.get(column))) is not None:
                    curve[step] = loss
    return sorted(train.items()), sorted(validation.items())


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with open(file, encoding="utf-8", newline="") as opened:
            for _, row in zip(range(MOST_ROWS), csv.DictReader(opened)):
                if (row.get("step") or "").isdigit():
                    yield int(row["step"]) + 1, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{quoted(file)} cannot be read: {quoted(str(error), bare=True)}.") from error


def _loss(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
