"""What was found in data files, as text and as a picture."""

import io
from collections.abc import Iterator

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from graftwork.planning.inspection import Inspection, Repeats, Shown
from graftwork.planning.rows import Lengths, Split

BAR = 40
"""Characters of the longest bar."""

MOST_TEXT = 600
"""Most characters of a stretch that are shown: the middle of a longer one is left out."""

GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"
WITHIN, BEYOND = "#08519c", "#e6550d"


def as_text(found: Inspection, colour: bool = False) -> str:
    """Return everything; what is learned is green with ``colour``, else it stands in « »."""
    parts = [*(_split(found, split) for split in found.findings.splits), _repeats(found)]
    parts += [_shown(one, colour) for one in found.shown]
    parts.append([f"problem: {one}" for one in found.problems] or ["no problems found"])
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _split(found: Inspection, split: Split) -> list[str]:
    more = "" if split.whole else " or more: these were looked at"
    head = f"{split.name}: {split.file}: {found.layouts[split.name]}, {split.rows:,} rows{more}"
    return [head, *(_lengths(split.lengths, split.rows, found.seq_length) if split.lengths else [])]


def _lengths(one: Lengths, rows: int, seq_length: int) -> Iterator[str]:
    yield f"  tokens a row: median {one.median:,}, longest {one.longest:,}"
    most, before = max(count for _, count in one.histogram), 0
    for end, count in one.histogram:
        bar = "█" * max(round(BAR * count / most), count > 0)
        yield f"  {f'{before + 1:,} to {end:,}':>18}  {count:>9,}  {bar}".rstrip()
        before = end
    yield (
        f"  seq_length={seq_length}: {one.cut:,} of {rows:,} rows ({one.cut / rows:.1%}) lose the beginning of their "
        f"prompt, {one.unfit:,} have an answer that does not fit"
    )
    if one.packing:
        yield (
            f"  packed: {one.packing.rows:,} rows of {seq_length:,} tokens, {one.packing.efficiency:.1%} full; "
            f"padded: {one.packing.padded_efficiency:.1%} full"
        )


def _repeats(found: Inspection) -> list[str]:
    told = [_repeat(one) for one in found.repeats if one.rows]
    if asked := found.findings.asked_before:
        told.append(f"{asked:,} of validation asked in train, with another answer")
    return [f"rows that stand twice: {'; '.join(told) or 'none, in a split or across splits'}"]


def _repeat(one: Repeats) -> str:
    within = one.split == one.other
    return f"{one.rows:,} within {one.split}" if within else f"{one.rows:,} of {one.split} in {one.other} too"


def _shown(one: Shown, colour: bool) -> list[str]:
    left, right = (GREEN, PLAIN) if colour else ("«", "»")
    parts = [f"{left}{_cut(text)}{right}" if learned else _cut(text) for text, learned in one.stretches]
    return [f"{one.place}, {one.tokens:,} tokens, learned {'in green' if colour else 'in « »'}:", "".join(parts)]


def _cut(text: str) -> str:
    """Return text that a terminal can show: no control characters, and not the whole of a book."""
    shown = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    half = MOST_TEXT // 2
    return shown if len(shown) <= MOST_TEXT else f"{shown[:half]} ... {shown[-half:]}"


def histogram(found: Inspection) -> bytes:
    """Return a PNG: per split, how many rows have how many tokens; bars above ``seq_length`` are orange."""
    splits = [(split.name, split.lengths) for split in found.findings.splits if split.lengths]
    figure = Figure(figsize=(max(6, 5 * len(splits)), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, one) in zip(figure.subplots(1, max(1, len(splits)), squeeze=False)[0], splits):
        ends = [end for end, _ in one.histogram]
        colours = [WITHIN if end <= found.seq_length else BEYOND for end in ends]
        bars = axes.bar([f"{end:,}" for end in ends], [count for _, count in one.histogram], color=colours)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axes.set_title(f"{name}: {sum(count for _, count in one.histogram):,} rows", fontsize=11)
        axes.set_xlabel(f"tokens a row, at most (orange: some above seq_length {found.seq_length:,})")
        axes.set_ylabel("rows")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
