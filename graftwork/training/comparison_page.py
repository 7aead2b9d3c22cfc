"""The leaderboard of several runs as an HTML page of its own: no script, no file beside it."""

import base64
from collections.abc import Sequence
from html import escape

from graftwork.training.plot import colour

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; background: #fff; }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 0.35rem 0.8rem; text-align: right; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #999; font-weight: 600; }
th:nth-child(2), td:nth-child(2), th:last-child, td:last-child { text-align: left; }
tbody tr:first-child { background: #f1f6fb; }
.run::before { content: ""; display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.5em;
  border-radius: 2px; background: var(--colour); }
img { max-width: 100%; margin-top: 1.5rem; }
""".strip()


def page(columns: Sequence[str], rows: Sequence[Sequence[str]], picture: bytes, title: str = "Runs compared") -> str:
    """Return the page: ``rows`` of text, the second cell of each naming the run, and a PNG of their curves."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(f"<tr>{_cells(number, row)}</tr>" for number, row in enumerate(rows))
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
<div class="scroll">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
<img alt="Loss curves of the runs" src="data:image/png;base64,{image}">
</body>
</html>
"""


def _cells(number: int, row: Sequence[str]) -> str:
    place, run, *others = map(escape, row)
    named = f'<td class="run" style="--colour: {colour(number)}">{run}</td>'
    return f"<td>{place}</td>{named}" + "".join(f"<td>{cell}</td>" for cell in others)
