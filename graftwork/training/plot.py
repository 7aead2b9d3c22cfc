"""The loss curve as a picture."""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[int, float]]


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
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or validation:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def smoothed(values: Sequence[float], share: float = 0.08) -> list[float]:
    """Return centred means over about ``share`` of the curve (at least 5 values), fewer towards its ends."""
    half = max(2, round(share * len(values) / 2))
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # equal reach on both sides, or the ends would lag
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means
