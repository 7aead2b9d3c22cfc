"""report.html: everything that a run is known by, on one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from graftwork.peft.artifact.card import Way
from graftwork.peft.movement import Movement
from graftwork.training.page.curves import Line, curves
from graftwork.training.page.frame import frame, section
from graftwork.training.page.heat_map import heat_maps
from graftwork.training.page.table import Answer, answers, before_after, confusion, number, tiles
from graftwork.training.page.usage import again_of, blocks
from graftwork.training.plot import LOSS, Points
from graftwork.training.summary import Summary

FIGURES = {
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", "before clipping"),
    "tokens_per_second": ("tokens per second", "without padding, over all devices"),
    "memory_gb": ("peak memory", "GB, of the first rank's process"),
}
"""Title and unit of every curve but the loss, by the name under which it is logged; ``name/part`` is a line of it."""
NOISY = ("grad_norm", "tokens_per_second")


@dataclass(frozen=True)
class Story:
    """What a page tells of a run.

    ``stack``: its transforms as they are written; ``recipe_changes``: lines of what is not as the recipe has it, each
    with - or + in front, '' for none; ``series``: points of what was logged, by name; ``confusion``: counts
    by right answer and by what was said, of each moment; ``usage``: how the result is used; ``seconds``: of training,
    over all its starts.
    """

    name: str
    directory: str
    stack: Sequence[str]
    base: str
    ended: str
    summary: Summary
    seconds: float
    train: Points
    validation: Points
    series: Mapping[str, Points]
    shown: Sequence[Answer] = ()
    confusion: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    moved: Sequence[Movement] = ()
    usage: Sequence[Way] = ()
    recipe_text: str | None = None
    recipe_changes: str | None = None


def run_page(story: Story) -> str:
    """Return the page; every text that comes from outside is escaped."""
    what = " + ".join(transform.partition("(")[0] for transform in story.stack) or "full fine-tuning"
    again = again_of(story.summary, story.directory, story.recipe_text, bool(story.stack))
    parts = [
        f"<h1>{escape(story.name)}</h1>",
        f'<p class="faint">{escape(what)} on {escape(story.base)}; ended {escape(story.ended)}</p>',
        tiles(_results(story)),
        section("Before and after", before_after(story.summary["metrics"])),
        section("Curves", _curves(story)),
        section("Where it learned", heat_maps(story.moved) if story.moved else ""),
        section("Answers", answers(story.shown)),
        section("Confusions", _confused(story)),
        section("Use it", blocks(story.usage)),
        section("What was set", _set(story.recipe_changes)),
        section("Make it again", blocks([again]) + _folded(story)),
    ]
    return frame(f"{story.name}: {what}", parts)


def _results(story: Story) -> list[tuple[str, str, str]]:
    made = story.summary
    trainable, total = made["trainable_parameters"], made["total_parameters"]
    first = story.validation[0] if story.validation else None
    since = f"the best; the first was {first[1]:.4f}" if first else "nothing was validated"
    return [
        ("validation loss", number(made["val_loss"], "{:.4f}"), since),
        ("training loss", number(made["train_loss"], "{:.4f}"), "of the last step, nats per token"),
        ("trained", f"{100 * trainable / max(total, 1):.2f} %", f"{trainable:,} of {total:,}"),
        ("time", duration(story.seconds), f"{made['steps']:,} steps"),
        ("tokens/s", f"{made['tokens_per_second']:,.0f}", "without padding and first step"),
        ("peak memory", f"{made['peak_memory_bytes'] / 1e9:.2f} GB", "of the first rank's process"),
    ]


def duration(seconds: float) -> str:
    """Return a time in the two units that matter: 2 d 3 h, 4 h 10 min, 3 min 5 s, 7.3 s."""
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    for size, name, smaller, rest in units:
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // smaller)} {rest}"
    return f"{seconds:.1f} s"


def _curves(story: Story) -> str:
    loss = [Line("training", story.train, 0, noisy=True), Line("validation", story.validation, 1, marked=True)]
    figures = [curves("loss", loss, LOSS.removeprefix("loss "))]
    for name, (title, unit) in FIGURES.items():
        found = {key: points for key, points in story.series.items() if key.partition("/")[0] == name}
        lines = [
            Line(key.partition("/")[2] or "all", points, number, name in NOISY)
            for number, (key, points) in enumerate(found.items())
        ]
        figures.append(curves(title, lines, unit, zero=name != "grad_norm"))
    return f'<div class="figures">{"".join(figures)}</div>' if any(figures) else ""


def _confused(story: Story) -> str:
    tables = [f"<div><h3>{escape(when)}</h3>{confusion(counts)}</div>" for when, counts in story.confusion.items()]
    return f'<div class="figures">{"".join(tables)}</div>' if tables else ""


def _set(changes: str | None) -> str:
    if changes is None:
        return ""
    return f"<pre>{escape(changes)}</pre>" if changes else '<p class="faint">The recipe as it is.</p>'


def _folded(story: Story) -> str:
    """Return the stack and, where it is known, the recipe's text, to be opened."""
    text, sha = story.recipe_text, story.summary["recipe_sha256"]
    told = {f"The stack, {len(story.stack)} in all": "\n".join(story.stack)} if story.stack else {}
    if text is not None:
        told[f"The recipe, {len(text.splitlines())} lines, SHA-256 {sha}"] = text
    opened = (f"<summary>{escape(name)}</summary><pre>{escape(body)}</pre>" for name, body in told.items())
    return "".join(f'<details class="faint">{one}</details>' for one in opened)
