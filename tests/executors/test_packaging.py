"""How code reaches a job: the commit, the commit with changes, or nothing; against git itself."""

import gc
import io
import subprocess
import tarfile
from pathlib import Path

import nemo_run as run
import pytest

from graftwork import __version__
from graftwork.errors import ConfigError
from graftwork.executors.cluster.packaging import code

AUTHOR = ["-c", "user.name=a", "-c", "user.email=a@example.org"]

ASKED = [("rev-parse", "HEAD"), ("status", "--porcelain"), ("stash", "list")]


def git(where: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(where), *AUTHOR, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


# NeMo Run's commands leave their pipes open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _without_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())  # NeMo Run's commands read it


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "inner").mkdir(parents=True)
    (root / "job.py").write_text("first\n")
    (root / ".gitignore").write_text("ignored\n")
    (root / "ignored").write_text("")
    git(root, "init", "-q")
    git(root, "add", "job.py", ".gitignore")
    git(root, "commit", "-qm", "first")
    return root


def shipped(packager: run.Packager, tmp_path: Path, name: str) -> dict[str, str]:
    """Unpack what the packager ships."""
    jobs = tmp_path / "jobs"
    jobs.mkdir(exist_ok=True)
    with tarfile.open(packager.package(Path(packager.basepath), str(jobs), name)) as archive:
        archive.extractall(jobs / name, filter="data")
    gc.collect()
    return {str(p.relative_to(jobs / name)): p.read_text() for p in (jobs / name).rglob("*") if p.is_file()}


def test_installed_ships_nothing_and_says_what_runs(tmp_path: Path) -> None:
    made = code("installed", start=tmp_path)
    assert type(made.packager) is run.Packager and made.record == f"installed graftwork {__version__}"


def test_git_ships_the_commit_from_anywhere_in_the_repository(repository: Path, tmp_path: Path) -> None:
    made = code("git", start=repository / "inner")
    first = git(repository, "rev-parse", "HEAD")
    assert made.record == f"git {first}"
    (repository / "job.py").write_text("second\n")
    git(repository, "commit", "-qam", "second")  # what was looked at is what is shipped
    assert shipped(made.packager, tmp_path, "one") == {"job.py": "first\n", ".gitignore": "ignored\n"}


@pytest.mark.parametrize("change", ["changed", "untracked", "staged"])
def test_a_tree_that_differs_from_the_commit_is_refused(change: str, repository: Path) -> None:
    name = "job.py" if change == "changed" else "new.py"
    (repository / name).write_text("changed\n")
    if change == "staged":
        git(repository, "add", name)
    with pytest.raises(ConfigError, match=rf"'{name}' in .* differ from it or are not tracked: commit them, or"):
        code("git", start=repository)


def test_allow_dirty_ships_the_changes_records_them_and_touches_nothing(repository: Path, tmp_path: Path) -> None:
    (repository / "job.py").write_text("changed\n")
    (repository / "new.py").write_text("not tracked\n")
    before = [git(repository, *asked) for asked in ASKED]
    made = code("git", allow_dirty=True, start=repository)
    assert made.record == f"git {before[0]} with uncommitted changes, as {made.packager.ref}"
    assert shipped(made.packager, tmp_path, "dirty")["job.py"] == "changed\n"
    assert "new.py" not in shipped(made.packager, tmp_path, "dirty")
    assert [git(repository, *asked) for asked in ASKED] == before
    assert git(repository, "show", f"{made.packager.ref}:job.py") == "changed"


def test_what_has_no_commit_cannot_be_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is in no git repository; code='installed' ships nothing"):
        code("git", start=tmp_path)
    git(tmp_path, "init", "-q")
    with pytest.raises(ConfigError, match="has none yet"):
        code("git", start=tmp_path)
    with pytest.raises(ConfigError, match="code='gti' is not known; did you mean 'git'"):
        code("gti")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs git, which is not installed here"):
        code("git", start=tmp_path)
