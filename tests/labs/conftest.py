"""Tests that install packages and start daemons, or say why they cannot; `make test-all` runs the longer ones too."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
