"""Curves as inline SVG, drawn by hand: a picture costs a millisecond and follows the colours of its page."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from graftwork.training.page.frame import variable
from graftwork.training.plot import Points, smoothed, spans_widely

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 10, 22
"""Margins: figures on the left, steps below."""
MOST_POINTS = 300
"""Longer lines are drawn by the least and the largest value of so many stretches, at most two for each pixel."""


@dataclass(frozen=True)
class Line:
    """One line of a picture: its name in the key, (step, value) points, the number of its colour.

    A ``noisy`` one is drawn thin and its smoothed course over it; ``marked`` has a dot at every point.
    """

    name: str
    points: Points
    colour: int = 0
    noisy: bool = False
    marked: bool = False


@dataclass(frozen=True)
class _Scale:
    """Where values of one axis stand: from ``low`` to ``high``, maybe as logarithms, between two places."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def curves(title: str, lines: Sequence[Line], unit: str = "", zero: bool = False) -> str:
    """Return a figure of several lines over the optimizer steps, '' where there is no point.

    ``zero``: the scale begins there; else it holds what there is, as logarithms where the values span widely. The
    caption names the ``unit``, and of a single line the value at the end.
    """
    drawn = [Line(x.name, [p for p in x.points if math.isfinite(p[1])], x.colour, x.noisy, x.marked) for x in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    steps = _Scale(*_stretched([p[0] for x in drawn for p in x.points], 0.0), LEFT, WIDTH - RIGHT)
    values = _values([p[1] for x in drawn for p in x.points], zero)
    parts = [*_grid(steps, values), *(part for line in drawn for part in _draw(line, steps, values))]
    now = [f"{drawn[0].points[-1][1]:.4g} at the end"] if len(lines) == 1 else []
    caption = f"{escape(title)} <small>{escape(', '.join([*filter(None, [unit]), *now]))}</small>"
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{picture}{_key(drawn)}</figure>"


def _values(values: Sequence[float], zero: bool) -> _Scale:
    log = spans_widely(values) and not zero
    low, high = (min(values), max(values)) if log else _stretched([0.0, *values] if zero else values, 0.05)
    return _Scale(0.0 if zero and low < 0 <= min(values) else low, high, HEIGHT - BOTTOM, TOP, log)


def _stretched(values: Sequence[float], by: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * by or (0.0 if high > low else abs(high) * 0.05 or 1.0)
    return low - room, high + room


def _grid(steps: _Scale, values: _Scale) -> Iterator[str]:
    for value in ticks(values.low, values.high, values.log):
        y = values.at(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
    for value in ticks(steps.low, steps.high):
        if value == int(value):
            yield f'<text x="{steps.at(value):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{short(value)}</text>'


def _draw(line: Line, steps: _Scale, values: _Scale) -> Iterator[str]:
    def path(points: Points, kind: str = "") -> str:
        places = "L".join(f"{steps.at(step):.1f} {values.at(value):.1f}" for step, value in points)
        return f'<path{kind} stroke="{variable(line.colour)}" d="M{places}"/>'

    if line.noisy:
        course = smoothed([value for _, value in line.points])
        yield path(thinned(line.points), ' class="raw"')
        yield path(thinned([(step, value) for (step, _), value in zip(line.points, course)]))
    else:
        yield path(thinned(line.points))
    if line.marked or len(line.points) == 1:
        for step, value in line.points[:: max(1, len(line.points) // 50)]:
            place = f'cx="{steps.at(step):.1f}" cy="{values.at(value):.1f}"'
            yield f'<circle {place} r="2.6" fill="{variable(line.colour)}"/>'


def _key(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    return f'<div class="key">{"".join(chip(line.name, line.colour) for line in lines)}</div>'


def chip(name: str, colour: int) -> str:
    """Return a name with its colour in front."""
    return f'<span class="chip" style="--colour: {variable(colour)}">{escape(name)}</span>'


def thinned(points: Points) -> list[tuple[int, float]]:
    """Return the least and the largest point of each of ``MOST_POINTS`` stretches, all points where they are few."""
    size = -(-len(points) // MOST_POINTS)
    if size < 3:
        return list(points)
    kept = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += [p for p in sorted(set(ends)) if p[0] > kept[-1][0]]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Return round values between two, about five of them; of a logarithmic scale 1, 2 and 5 of each power of ten."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        inside = [value for value in found if low <= value <= high]
        return inside[:: -(-len(inside) // 6)] if inside else [low, high]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(value: float) -> str:
    """Return a figure of an axis in few characters: 1.5M, 20k, 0.003, 2e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if letter == "k" else 1):
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
