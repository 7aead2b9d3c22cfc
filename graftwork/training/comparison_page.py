"""The leaderboard of several runs as an HTML page of its own: no script, no file beside it."""

from collections.abc import Sequence
from html import escape

from graftwork.training.page.curves import Line, chip, curves
from graftwork.training.page.frame import frame
from graftwork.training.page.table import framed
from graftwork.training.plot import Curve, smoothed

TITLE = "Runs compared"


def page(columns: Sequence[str], rows: Sequence[Sequence[str]], runs: Sequence[Curve]) -> str:
    """Return the page: ``rows`` of text, the second cell of each naming the run, and the curves of ``runs``."""
    cells = [_cells(number, row) for number, row in enumerate(rows)]
    words = (1, len(columns) - 1)
    train = [Line(run.name, _smooth(run), number) for number, run in enumerate(runs)]
    validation = [Line(run.name, run.validation, number, marked=True) for number, run in enumerate(runs)]
    pictures = (
        curves("training loss", train, "smoothed, nats per answer token"),
        curves("validation loss", validation, "nats per answer token"),
    )
    return frame(
        TITLE,
        [
            f"<h1>{TITLE}</h1>",
            framed(columns, cells, words, kind="best"),
            f'<div class="figures wide">{"".join(pictures)}</div>',
        ],
    )


def _cells(number: int, row: Sequence[str]) -> list[str]:
    place, run, *others = row
    return [escape(place), chip(run, number), *map(escape, others)]


def _smooth(run: Curve) -> list[tuple[int, float]]:
    return [(step, loss) for (step, _), loss in zip(run.train, smoothed([loss for _, loss in run.train]))]
