"""The loss curve as a picture."""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

Points = Sequence[tuple[int, float]]

WIDE = 20.0
"""Losses that span more than this factor are drawn on a logarithmic scale: the end would else be a flat line."""


def loss_curve(train: Points, validation: Points, title: str) -> bytes:
    """Return a PNG of (step, loss) points: training raw and smoothed, validation as marks."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train)
        axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="train")
        axes.plot(steps, smoothed(losses), color="#08519c", linewidth=2, label="train, smoothed")
    if validation:
        steps, losses = zip(*validation)
        axes.plot(steps, losses, "o-", color="#e6550d", markersize=5, linewidth=1.2, label="validation")
        axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(6, 6), textcoords="offset points",
                      color="#e6550d", fontsize=9)  # fmt: skip
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if spans_widely([loss for _, loss in (*train, *validation)]):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or validation:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def spans_widely(losses: Sequence[float]) -> bool:
    """Tell whether positive losses differ by more than ``WIDE``."""
    return bool(losses) and min(losses) > 0 and max(losses) > WIDE * min(losses)


def smoothed(values: Sequence[float], share: float = 0.08) -> list[float]:
    """Return centred means over about ``share`` of the curve (at least 5 values), fewer towards its ends."""
    half = max(2, round(share * len(values) / 2))
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # equal reach on both sides, or the ends would lag
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means
