"""The site builds, every link and anchor in it leads somewhere, and what may be imported is in its API pages."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers.snippets import ROOT

ROOMS = ("peft", "models", "data", "training", "training.callbacks", "inference", "executors", "models.merging")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` does: with ``--strict`` a warning is an error."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def test_every_page_and_the_search_are_built(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        place = name.parent if name.name in ("index", "README") else name
        assert (site / place / "index.html").is_file(), name
    index = (site / "search" / "search_index.json").read_text()
    assert "api/peft/" in index and "troubleshooting/#configerror" in index


@pytest.mark.parametrize("room", ROOMS)
def test_whatever_a_room_offers_is_in_the_api(room: str, site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "api").rglob("index.html"))
    for name in import_module(f"graftwork.{room}").__all__:
        assert f'.{name}"' in pages, f"{name} of graftwork.{room}: add it to a page of docs/api"
