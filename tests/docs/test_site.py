"""The site builds, every link and anchor in it leads somewhere, and what may be imported is in its API pages."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers.snippets import ROOT

CONFIG = ROOT / "mkdocs.yml"
ROOMS = ("peft", "models", "data", "training", "training.callbacks", "inference", "executors", "models.merging")


def build(config: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as ``make docs`` does: a warning is an error, but not with ``--quiet``, which hides it from both."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site."""
    directory = tmp_path_factory.mktemp("site")
    built = build(CONFIG, directory)
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def test_an_anchor_that_is_not_there_fails(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    pages.joinpath("index.md").write_text("# T\n\n[somewhere](index.md#nowhere)\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {CONFIG}\ndocs_dir: {pages}\nnav: [index.md]\n")
    built = build(config, tmp_path / "site")
    assert built.returncode == 1 and "index.md#nowhere" in built.stderr, built.stderr


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
