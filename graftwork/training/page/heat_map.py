"""Where a stack learned: a map of its sites over the layers, the warmer the further a site has moved."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import sqrt

from graftwork.peft.movement import Movement
from graftwork.peft.sites import Place
from graftwork.training.page.table import table

MOST_NUMBERED = 12
"""So many layers have room for a number in every cell: its share of the warmest one, in percent."""
_EXPERT = re.compile(r"local_experts\.\d+\.")
OF_WEIGHT = "root mean square of the change scale·B·A of a weight, at the last step"
OF_VALUES = "root mean square of what the trained numbers have moved from their initial values, at the last step"


@dataclass(frozen=True)
class _Row:
    """The movements of one kind of site by layer."""

    label: str
    by_layer: dict[int, float]


def heat_maps(moved: Sequence[Movement]) -> str:
    """Return one map for each adapter, with its own scale, and a table of its sites outside of the layers."""
    return "\n".join(_of_adapter(name, moved) for name in dict.fromkeys(one.adapter for one in moved))


def _of_adapter(name: str, moved: Sequence[Movement]) -> str:
    mine = [one for one in moved if one.adapter == name]
    parts = dict.fromkeys(Place(one.site).part or "" for one in mine if Place(one.site).layer is not None)
    outside = [[one.site, f"{one.rms:.3g}", f"{one.norm:.4g}"] for one in mine if Place(one.site).layer is None]
    rows = {part: _rows(mine, part) for part in parts}
    largest = max((value for of in rows.values() for row in of for value in row.by_layer.values()), default=0.0)
    maps = [_map(part if len(parts) > 1 else "", of_part, largest) for part, of_part in rows.items()]
    rest = table(["outside of the layers", "root mean square", "norm"], outside) if outside else ""
    what = OF_WEIGHT if mine[0].of_weight else OF_VALUES
    scale = f'<p class="faint">0<span class="scale"></span>{largest:.3g} (= 100): {what}</p>' if maps else ""
    mixed = len({one.of_weight for one in mine}) > 1
    note = '<p class="faint">Sites without low-rank factors of a weight show their own numbers.</p>' if mixed else ""
    return "\n".join([f"<h3>{escape(name)}</h3>", *maps, scale, note, rest])


def _rows(moved: Sequence[Movement], part: str) -> list[_Row]:
    """Return the sites of a part by what they are called inside of a layer; experts of a layer count as one."""
    found: dict[str, dict[int, list[Movement]]] = {}
    for one in moved:
        place = Place(one.site)
        if place.layer is not None and (place.part or "") == part:
            name = _EXPERT.sub("", place.inside or "layer")
            found.setdefault(name, {}).setdefault(place.layer, []).append(one)
    leaves = [name.rpartition(".")[2] for name in found]
    labels = leaves if len(set(leaves)) == len(leaves) else list(found)
    return [_Row(label, {n: _joined(ones) for n, ones in by.items()}) for label, by in zip(labels, found.values())]


def _joined(moved: Sequence[Movement]) -> float:
    """Return the root mean square over several sites."""
    return sqrt(sum(one.norm**2 for one in moved) / sum(one.numbers for one in moved))


def _map(title: str, rows: Sequence[_Row], largest: float) -> str:
    layers = range(max(layer for row in rows for layer in row.by_layer) + 1)
    every = -(-len(layers) // MOST_NUMBERED)
    head = "".join(f"<th>{layer if layer % every == 0 else ''}</th>" for layer in layers)
    body = "".join(
        f"<tr><th>{escape(row.label)}</th>{''.join(_cell(row, layer, largest, every == 1) for layer in layers)}</tr>"
        for row in rows
    )
    named = f"{title}, layer" if title else "layer"
    opened = f'<table class="heat" style="--layers: {len(layers)}">'
    return f"{opened}<thead><tr><th>{escape(named)}</th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(row: _Row, layer: int, largest: float, numbered: bool) -> str:
    value = row.by_layer.get(layer)
    if value is None:
        return "<td></td>"
    share = value / largest if largest else 0.0
    title = escape(f"{row.label}, layer {layer}: {value:.4g}")
    hot = ' class="hot"' if share > 0.8 else ""
    return f'<td{hot} style="--share: {share:.3f}" title="{title}">{round(100 * share) if numbered else ""}</td>'
