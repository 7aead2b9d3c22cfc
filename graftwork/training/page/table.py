"""Tables of a page: figures, texts beside each other, confusions."""

from collections.abc import Collection, Mapping, Sequence
from html import escape


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[int] = (0,)) -> str:
    """Return a table of cells that are plain text; the columns with the numbers ``text`` hold words, not numbers."""
    return framed(columns, [[escape(cell) for cell in row] for row in rows], text)


def framed(columns: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[int] = (0,), kind: str = "") -> str:
    """Return a table of cells that are HTML; one of the ``kind`` stack lays its cells below each other on a phone."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(_cell(tag, cell, i in text, columns[i]) for i, cell in enumerate(cells))

    head = line("th", [escape(column) for column in columns])
    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    name = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{name}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _cell(tag: str, html: str, words: bool, name: str) -> str:
    kind = ' class="text"' if words else ""
    return f'<{tag}{kind} data-name="{escape(name)}">{html}</{tag}>'


def before_after(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Return the metrics of a run, before and after it; nothing without any."""
    rows = [
        [name, number(values.get("before")), number(values.get("after")), _change(values)]
        for name, values in metrics.items()
    ]
    return table(["", "before", "after", "change"], rows) if rows else ""


def _change(values: Mapping[str, float]) -> str:
    both = "before" in values and "after" in values
    return f"{values['after'] - values['before']:+.4g}" if both else ""


def number(value: float | None, form: str = "{:.4g}") -> str:
    """Return a figure as text, a dash without one."""
    return "–" if value is None else form.format(value)


Answer = tuple[int, str, str, str]
"""After how many steps, the prompt, what the model said, what is right."""


def answers(shown: Sequence[Answer]) -> str:
    """Return what was said before the first step and after the last beside what is right; nothing without answers.

    What was said in between is folded in.
    """
    steps = sorted({step for step, *_ in shown})
    if not steps:
        return ""
    asked: dict[int, list[Answer]] = {step: [one for one in shown if one[0] == step] for step in steps}
    first, last = asked[steps[0]], asked[steps[-1]]
    columns = ["asked", f"at step {steps[0]:,}", f"at step {steps[-1]:,}", "right"]
    rows = [[escape(old[1]), said(old), said(new), escape(old[3])] for old, new in zip(first, last)]
    between = [[f"{one[0]:,}", escape(one[1]), said(one)] for one in shown]
    folded = framed(["step", "asked", "said"], between, text=(1, 2), kind="stack")
    more = f"<details><summary>All {len(steps)} moments</summary>\n{folded}</details>" if len(steps) > 2 else ""
    return framed(columns, rows, text=range(4), kind="stack") + more


def said(answer: Answer) -> str:
    """Return an answer with a mark: right or not; without one where nobody knows."""
    _, _, output, expected = answer
    if not expected:
        return escape(output)
    hit = output.strip() == expected.strip()
    mark = '<span class="good">✓</span>' if hit else '<span class="bad">✗</span>'
    return f"{escape(output)} {mark}"


def confusion(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return the table of right answers (rows) against what was said (columns)."""
    labels = list(dict.fromkeys([*counts, *(label for row in counts.values() for label in row)]))
    rows = [[escape(right), *(_count(counts, right, other) for other in labels)] for right in counts]
    return framed(["right \\ said", *labels], rows, kind="confusion")


def _count(counts: Mapping[str, Mapping[str, int]], right: str, other: str) -> str:
    value = f"{counts[right].get(other, 0):,}"
    return f'<b class="good">{value}</b>' if right == other else value


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Return figures one beside the other: what each is, its value, a word on it."""
    texts = [[escape(text) for text in value] for value in values]
    shown = (f"<div>{what}<b>{value}</b><span>{word}</span></div>" for what, value, word in texts)
    return f'<div class="tiles">{"".join(shown)}</div>'
