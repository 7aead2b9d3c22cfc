"""What commands print, as it stands in a page: a lab records it, and fails when the page tells something else.

A page holds ``<!-- transcript NAME: written by its lab -->`` and ``<!-- end of NAME -->``. With GRAFTWORK_WRITE_GOLDEN
set the lab writes the block between them.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_DIFFERS = re.compile(r"[0-9a-f]{64}|\d[\d,.:e+-]*")


class Transcript:
    """Commands and what they printed; ``names`` shortens what differs from machine to machine."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names, self.lines = names, list[str]()

    def add(self, typed: str, printed: str) -> None:
        """Record one command."""
        self.lines += [*([""] if self.lines else []), f"$ {typed}", *printed.rstrip().splitlines()]

    def text(self) -> str:
        """Return the block as a page holds it."""
        text = "\n".join(self.lines)
        for machine, shown in self.names.items():
            text = text.replace(machine, shown)
        return f"```text\n{text}\n```"

    def check(self, page: str, name: str) -> None:
        """Compare with the block ``name`` of a page, numbers and repetitions apart."""
        file = DOCS / page
        begin, end = f"<!-- transcript {name}: written by its lab -->", f"<!-- end of {name} -->"
        before, rest = file.read_text().split(begin)
        told, after = rest.split(end)
        if os.environ.get("GRAFTWORK_WRITE_GOLDEN"):
            file.write_text(f"{before}{begin}\n\n{self.text()}\n\n{end}{after}")
        else:
            missing = set(_kinds(told.strip())) - set(_kinds(self.text()))  # a machine may have warnings of its own
            assert not missing, f"{page}: {name} does not print {sorted(missing)}, but {self.text()}"


def _kinds(text: str) -> list[str]:
    """Return the lines without their numbers: how often a training tells its progress is a matter of time."""
    return _DIFFERS.sub("N", text).splitlines()
