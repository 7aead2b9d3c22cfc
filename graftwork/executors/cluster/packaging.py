"""How code reaches a job: the commit, as a git archive, or nothing, where the package is installed already."""

import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional

import nemo_run as run

from graftwork import __version__
from graftwork.errors import ConfigError, suggest

VARIABLE = "GRAFTWORK_CODE"
"""The environment variable of a job that says which code it runs."""

WAYS = ("installed", "git")


@dataclass(frozen=True)
class Code:
    """What is shipped, and the words that the job's record has for it."""

    packager: run.Packager
    record: str


def code(way: str = "installed", allow_dirty: bool = False, start: Optional[Path] = None) -> Code:
    """Return how code reaches a job: ``git`` ships the commit of the repository around ``start`` (default: here).

    ``installed`` ships nothing. Files that git does not track are never shipped. Raises ConfigError where there is no
    commit, and for changes that are not committed unless ``allow_dirty`` ships them too.
    """
    if way not in WAYS:
        raise ConfigError(f"code={way!r} is not known; {suggest(way, WAYS)}")
    return (
        Code(run.Packager(), f"installed graftwork {_installed()}")
        if way == "installed"
        else _commit(start or Path.cwd(), allow_dirty)
    )


def _commit(start: Path, allow_dirty: bool) -> Code:
    root = _git(start, "rev-parse", "--show-toplevel")
    if not root:
        raise ConfigError(
            f"code='git' ships a commit, but {str(start)!r} is in no git repository; code='installed' ships nothing."
        )
    commit = _git(start, "rev-parse", "--verify", "HEAD")
    if not commit:
        raise ConfigError(f"code='git' ships a commit, but {root!r} has none yet.")
    changed = _git(start, "status", "--porcelain").splitlines()
    if not changed:
        return Code(_archive(root, commit), f"git {commit}")
    if not allow_dirty:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ConfigError(
            f"code='git' ships the commit, but {changed[0][3:]!r}{more} in {root!r} differ from it or are not tracked: "
            "commit them, or set allow_dirty=True to ship the changes of tracked files too."
        )
    # A commit object of the files as they stand; neither the working tree nor the list of stashes is touched.
    shipped = _git(start, "stash", "create") or commit
    return Code(_archive(root, shipped), f"git {commit} with uncommitted changes, as {shipped}")


def _archive(root: str, commit: str) -> run.GitArchivePackager:
    return run.GitArchivePackager(basepath=root, ref=commit, include_submodules=Path(root, ".gitmodules").exists())


def _git(where: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("code='git' needs git, which is not installed here; code='installed' does not.") from error
    return done.stdout.rstrip("\n") if done.returncode == 0 else ""


def _installed() -> str:
    try:
        return version("graftwork")
    except PackageNotFoundError:
        return __version__
