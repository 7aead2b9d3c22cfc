"""The fenced blocks of README and docs: found, and run as a reader would."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
RUN = ("python", "sh", "console")
SHOWN = ("text", "json", "yaml", "dockerfile")
_FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: ``line`` is that of its first line of code, ``marks`` the words after the language."""

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    code: str

    @property
    def slow(self) -> bool:
        """Whether it needs the pretrained model."""
        return "slow" in self.marks

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Return README and the pages of the site that are not records of the past."""
    docs = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name != "log.md" and p.parent.name != "decisions"]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *docs]


def blocks(page: Path) -> list[Block]:
    """Return every fenced block of ``page``, in order."""
    text = page.read_text()
    found = []
    for fence in _FENCE.finditer(text):
        line = text[: fence.start(4)].count("\n") + 1
        found.append(Block(page, line, fence.group(2), tuple(fence.group(3).split()), fence.group(4)))
    return found


def run_python(found: list[Block], namespace: dict[str, Any]) -> None:
    """Run the blocks of one page in one namespace; a traceback points into the page."""
    for block in found:
        source = "\n" * (block.line - 1) + block.code
        exec(compile(source, str(block.page), "exec"), namespace)


def commands(block: Block) -> list[list[str]]:
    """Return the commands of a ``sh`` block (or the ``$`` lines of a ``console`` block) as words."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    words = (shlex.split(line, comments=True) for line in lines)
    return [w for w in words if w]


def shown_output(block: Block) -> list[str]:
    """Return what a ``console`` block says is printed."""
    return [line for line in block.code.replace("\\\n", " ").splitlines() if line and not line.startswith("$ ")]


def graft(words: list[str]) -> Result:
    """Run ``nemorun graft ...`` in this process, as a dry run."""
    from nemo_run.cli.api import create_cli, list_entrypoints

    assert words[:2] == ["nemorun", "graft"], words
    app = create_cli(nested_entrypoints_creation=False)
    import nemo_run.cli.api as api

    api._add_typer_nested(app, list_entrypoints())
    arguments = [w for w in words[1:] if w not in ("--yes", "--dryrun")]
    return CliRunner().invoke(app, [*arguments, *([] if "--help" in words else ["--dryrun"])])
