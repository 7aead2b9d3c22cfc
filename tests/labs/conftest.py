"""Tests that install packages and start daemons: `make test-all` runs them."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.path.name != "test_dockerfile.py":
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose graftwork tells that it is not the one that the image holds."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "graftwork", root / "graftwork", ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "graftwork" / "__init__.py").open("a") as file:
        file.write("print('the commit runs', flush=True)\n")
    git = ["git", "-C", str(root), "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    return root
