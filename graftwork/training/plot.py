"""Loss curves as pictures: of one run, and of several beside each other."""

import io
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

Points = Sequence[tuple[int, float]]

LOSS = "loss per answer token (nats)"

COLOURS = ("#08519c", "#e6550d", "#31a354", "#756bb1", "#d62728", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#111111")
OTHERS = "#c7c7c7"
MOST_NAMED = len(COLOURS)
"""Most runs that a picture tells apart."""

WIDE = 20.0
"""Losses that span more than this factor are drawn on a logarithmic scale: the end would else be a flat line."""


class Curve(NamedTuple):
    """The losses of one run by step, and what a legend calls it."""

    name: str
    train: Points
    validation: Points


def loss_curve(train: Points, validation: Points, title: str) -> bytes:
    """Return a PNG of (step, loss) points: training raw and smoothed, validation as marks."""
    figure = _figure(8, layout=None)  # margins that are given cost no second drawing
    axes = figure.add_axes((0.09, 0.12, 0.89, 0.8))
    if train:
        steps, losses = zip(*train)
        axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="train")
        axes.plot(steps, smoothed(losses), color="#08519c", linewidth=2, label="train, smoothed")
    if validation:
        steps, losses = zip(*validation)
        axes.plot(steps, losses, "o-", color="#e6550d", markersize=5, linewidth=1.2, label="validation")
        axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(6, 6), textcoords="offset points",
                      color="#e6550d", fontsize=9)  # fmt: skip
    _dress(axes, title, (*train, *validation))
    axes.set_ylabel(LOSS)
    if train or validation:
        axes.legend(frameon=False)
    return _png(figure)


def loss_curves(curves: Sequence[Curve], title: str = "") -> bytes:
    """Return a PNG of several runs: their smoothed training losses, and their validation losses beside them.

    The first ``MOST_NAMED`` have a colour and stand in the legend; the others are grey behind them.
    """
    figure = _figure(11)
    panels = [
        ("training loss, smoothed", [c.train for c in curves]),
        ("validation loss", [c.validation for c in curves]),
    ]
    shown = [(name, points) for name, points in panels if any(points)] or panels[:1]
    for axes, (name, points) in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown):
        for number, (curve, of_run) in reversed(list(enumerate(zip(curves, points)))):
            if of_run:
                _draw(axes, number, curve.name, of_run, smooth=name.startswith("training"))
        _dress(axes, name, [point for of_run in points for point in of_run])
    figure.axes[0].set_ylabel(LOSS)
    handles = [Line2D([], [], color=colour(i), linewidth=2, label=c.name) for i, c in enumerate(curves[:MOST_NAMED])]
    more = [Line2D([], [], color=OTHERS, label=f"{len(curves) - MOST_NAMED} more")] if len(curves) > MOST_NAMED else []
    figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    return _png(figure)


def colour(number: int) -> str:
    """Return the colour of the run with this number, as HTML writes it."""
    return COLOURS[number] if number < MOST_NAMED else OTHERS


def _draw(axes: Axes, number: int, name: str, points: Points, smooth: bool) -> None:
    steps, losses = zip(*points)
    axes.plot(
        steps, smoothed(losses) if smooth else losses, "-" if smooth else "o-",
        color=colour(number), linewidth=1.8 if number < MOST_NAMED else 0.8, markersize=3.5, label=name,
    )  # fmt: skip


def _figure(width: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    figure = Figure(figsize=(width, 4.5), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Axes, title: str, points: Points) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if spans_widely([loss for _, loss in points]):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def spans_widely(losses: Sequence[float]) -> bool:
    """Tell whether positive losses differ by more than ``WIDE``."""
    return bool(losses) and min(losses) > 0 and max(losses) > WIDE * min(losses)


def smoothed(values: Sequence[float], share: float = 0.08) -> list[float]:
    """Return centred means over about ``share`` of the curve (at least 5 values), fewer towards its ends."""
    half = max(2, round(share * len(values) / 2))
    sums = list(accumulate(values, initial=0.0))
    reaches = [min(half, i, len(values) - 1 - i) for i in range(len(values))]  # equal on both sides, or ends would lag
    return [(sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1) for i, reach in enumerate(reaches)]
