"""README and docs tell the truth: every block runs, every command parses, every link leads somewhere."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.snippets import ROOT, RUN, SHOWN, Block, blocks, commands, graft, pages, run_python, shown_output

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page)]
LINK = re.compile(r"(?<!`)\]\(([^)\s]+)\)")
PLAIN = {".": 2, "make": 2, "pip": 4}
"""Commands that are not run, only looked at, and their most words."""


def of(language: str, page: Path) -> list[Block]:
    return [b for b in BLOCKS if b.page == page and b.language == language]


def ids(items: list[Any]) -> list[str]:
    return [str(i) if isinstance(i, Block) else str(i.relative_to(ROOT)) for i in items]


def test_every_block_says_what_it_is() -> None:
    assert len(BLOCKS) > 40, "the pages have blocks; has the fence changed?"
    assert [str(b) for b in BLOCKS if b.language not in RUN + SHOWN or set(b.marks) - {"slow"}] == []
    fences = sum(page.read_text().count("\n```") for page in PAGES)
    assert fences == 2 * len(BLOCKS), "a fence without an end, or an indented one"


WITH_PYTHON = [p for p in PAGES if any(not b.slow for b in of("python", p))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=ids(WITH_PYTHON))
def test_python_runs(page: Path, small_desk: Path) -> None:
    run_python([b for b in of("python", page) if not b.slow], {"__name__": "page"})


WITH_SLOW_PYTHON = [p for p in PAGES if any(b.slow for b in of("python", p))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_SLOW_PYTHON, ids=ids(WITH_SLOW_PYTHON))
def test_python_runs_on_the_pretrained_model(page: Path, desk: Path) -> None:
    run_python(of("python", page), {"__name__": "page"})


SHELL = [b for b in BLOCKS if b.language == "sh"]


@pytest.mark.parametrize("block", SHELL, ids=ids(SHELL))
def test_commands_are_right(block: Block, small_desk: Path) -> None:
    for words in commands(block):
        program = words[0].rpartition("/")[2]
        if program == "nemorun":
            done = graft(["nemorun", *words[1:]])
            assert done.exit_code == 0, f"{block}: {' '.join(words)}\n{done.output}"
        else:
            assert len(words) <= PLAIN[program] or program == "pip", words
            check_plain(program, words)


def check_plain(program: str, words: list[str]) -> None:
    if program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()


CONSOLE = [b for b in BLOCKS if b.language == "console"]


@pytest.mark.parametrize("block", CONSOLE, ids=ids(CONSOLE))
def test_mistakes_print_what_the_page_says(block: Block, small_desk: Path) -> None:
    printed = [graft(words).stderr.rstrip("\n") for words in commands(block)]
    assert printed == shown_output(block)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("https:", "http:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}; {anchors(file)}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


def test_a_wrong_snippet_fails(small_desk: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# T\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run_python(blocks(page), {})
    assert (error.traceback[-1].path, error.traceback[-1].lineno) == (page, 7)
    assert graft(["nemorun", "graft", "finetune", "--factory", "smollm2_135m", "data.trian=x"]).exit_code == 2


def test_every_page_is_in_the_navigation() -> None:
    _, _, navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    docs, decisions = ROOT / "docs", ROOT / "docs" / "decisions"
    named = [page.relative_to(docs) for page in docs.rglob("*.md") if page.parent != decisions]
    assert [str(page) for page in named if not re.search(rf"[ :]{page}$", navigation, re.MULTILINE)] == []
    table = (decisions / "README.md").read_text()
    assert [p.name for p in decisions.glob("0*.md") if f"({p.name})" not in table] == []
