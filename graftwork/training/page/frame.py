"""What every page has in common: its frame and its style, light and dark, on paper and on a phone."""

from collections.abc import Iterable
from html import escape

from graftwork.training.plot import COLOURS, OTHERS

_COLOURS = "".join(f" --c{number}: {colour};" for number, colour in enumerate((*COLOURS, OTHERS)))
_AT_NIGHT = "".join(
    f" --c{number}: color-mix(in oklab, {colour} 60%, white);" for number, colour in enumerate((*COLOURS, "#555"))
)

STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1c1c1c; --faint: #666; --paper: #fff; --rule: #ddd; --tint: #f2f6fa;
  --warm: #b8440a; --good: #1b7837; --bad: #b2182b;{_COLOURS} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e4e4; --faint: #a0a0a0; --paper: #16181b; --rule: #3a3d42;
  --tint: #20252b; --warm: #ff9a52; --good: #7fc98d; --bad: #f4877f;{_AT_NIGHT} }} }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 76rem; padding: 1.2rem 1rem 3rem; }}
h1 {{ font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
h3 {{ font-size: .95rem; margin: 1rem 0 .3rem; }}
p {{ margin: .3rem 0; }}
.faint {{ color: var(--faint); overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }}
th {{ font-weight: 600; }}
thead th {{ border-bottom: 2px solid var(--faint); }}
th:first-child, td:first-child {{ padding-left: 0; }}
th.text, td.text {{ text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 8rem; }}
.best tbody tr:first-child {{ background: var(--tint); }}
.best td.text, .best th.text {{ white-space: nowrap; }}
.good {{ color: var(--good); }}
.bad {{ color: var(--bad); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }}
.tiles div {{ background: var(--tint); border-radius: 6px; padding: .6rem .8rem; }}
.tiles b {{ display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }}
.tiles span {{ display: block; font-size: .85rem; color: var(--faint); }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem 1.5rem; }}
.wide {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }}
figure {{ margin: 0; break-inside: avoid; }}
figcaption {{ font-weight: 600; font-size: .95rem; }}
figcaption small {{ font-weight: 400; color: var(--faint); }}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ fill: var(--faint); font-size: 11px; }}
svg path {{ fill: none; stroke-width: 1.6; stroke-linejoin: round; vector-effect: non-scaling-stroke; }}
svg .raw {{ stroke-width: 1; opacity: .4; }}
svg .grid {{ stroke: var(--rule); stroke-width: 1; }}
.key span {{ margin-right: 1rem; font-size: .85rem; white-space: nowrap; }}
.chip::before {{ content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px;
  background: var(--colour); print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
.heat {{ table-layout: fixed; width: 100%; max-width: calc(9rem + var(--layers) * 5rem); }}
.heat th, .heat td {{ padding: 0; border: 1px solid var(--paper); font-weight: 400; font-size: .8rem; height: 1.7rem;
  text-align: center; vertical-align: middle; }}
.heat thead th {{ color: var(--faint); overflow: visible; white-space: nowrap; }}
.heat th:first-child {{ text-align: left; width: 9rem; overflow-wrap: anywhere; line-height: 1.1; }}
.heat td.hot {{ color: var(--paper); }}
.heat td, .scale {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
.heat td[style] {{ background: color-mix(in oklab, var(--warm) calc(var(--share) * 85%), var(--tint)); }}
.scale {{ display: inline-block; width: 8rem; height: .7rem; margin: 0 .5rem; vertical-align: middle;
  background: linear-gradient(to right in oklab, var(--tint), color-mix(in oklab, var(--warm) 85%, var(--tint))); }}
.confusion td.hit {{ font-weight: 600; }}
pre {{ background: var(--tint); border-radius: 6px; padding: .6rem .8rem; margin: .3rem 0; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }}
summary {{ cursor: pointer; }}
@media (max-width: 40rem) {{ th, td {{ padding: .3rem .4rem; }} .heat th:first-child {{ width: 6.5rem; }}
  .stack thead {{ display: none; }} .stack td {{ display: block; padding-left: 0; border: 0; }}
  .stack td::before {{ content: attr(data-name); display: block; font-size: .8rem; color: var(--faint); }}
  .stack tr {{ display: block; border-bottom: 1px solid var(--rule); padding: .3rem 0; }} }}
@media print {{ body {{ max-width: none; padding: 0; font-size: 12px; }} h2, h3 {{ break-after: avoid; }}
  tr, pre {{ break-inside: avoid; }} }}
""".strip()


def frame(title: str, parts: Iterable[str]) -> str:
    """Return the page of this title: ``parts`` are HTML, in which whatever others have written is escaped already."""
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def section(title: str, html: str) -> str:
    """Return a heading and what stands below it; nothing without the latter."""
    return f"<h2>{escape(title)}</h2>\n{html}" if html else ""


def variable(number: int) -> str:
    """Return the CSS variable of the colour of the run or line with this number; the last one is for all others."""
    return f"var(--c{min(number, len(COLOURS))})"
