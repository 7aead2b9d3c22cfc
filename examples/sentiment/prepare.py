"""Movie sentiment as JSONL, out of the vaderSentiment source distribution (Hutto and Gilbert 2014; 10,605 reviews).

Keeps the 9,171 distinct one-sentence reviews whose mean rating is at least 1 away from neutral, half of them positive,
and splits them with a fixed seed. Run as a script it prints the directory with train, validation and test.jsonl.
"""

import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from graftwork.atomic import atomic_directory
from graftwork.errors import DataError, GraftworkError

REQUIREMENTS = Path(__file__).with_name("data-requirements.txt")
SDIST = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR_RATING = 1.0
SEED = 1234
TEST_ROWS = 200
VALIDATION_ROWS = 64

Row = dict[str, str]


def cache() -> Path:
    """Return graftwork's cache, as graftwork.models does (importing that takes seconds)."""
    if chosen := os.environ.get("GRAFTWORK_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftwork"


def prepare(directory: Path | None = None, sdist: Path | None = None) -> Path:
    """Return the directory with train, validation and test.jsonl, made once; ``sdist`` saves the download."""
    target = directory or cache() / "datasets" / "movie_sentiment"
    if not (target / "test.jsonl").exists():
        splits = split(rows(read_reviews(sdist or fetch(cache() / "downloads"))))
        with atomic_directory(target) as folder:
            for name, part in splits.items():
                folder.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return target


def fetch(downloads: Path) -> Path:
    """Return the source distribution, downloaded with its hash checked when ``downloads`` lacks it."""
    path = downloads / SDIST
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            download(folder)
            downloads.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(Path(folder, SDIST).read_bytes())
            part.replace(path)
    return path


def download(folder: str) -> None:
    """Let pip fetch the source distribution into ``folder`` and check its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
    done = subprocess.run([*command, "-d", folder, "-r", str(REQUIREMENTS)], capture_output=True, text=True)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no output"]
        raise DataError(
            f"the reviews are missing: {SDIST} is not in {cache() / 'downloads'} and pip cannot get it ({reason[-1]}); "
            "put that file there, or run once with a package index."
        )


def read_reviews(sdist: Path) -> list[str]:
    """Return the lines ``id<TAB>mean rating<TAB>review`` of the archive inside the source distribution."""
    try:
        with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
            member = inner.extractfile(REVIEWS)
            assert member is not None, f"{REVIEWS} is a regular file of a hash-checked archive"
            return member.read().decode().splitlines()
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise DataError(f"{sdist} is damaged ({error}); delete it and run again.") from error


def rows(lines: Iterable[str]) -> list[Row]:
    """Return distinct clear reviews as ``{"input", "output"}``, in file order."""
    kept: dict[str, Row] = {}
    for line in lines:
        _, rating, text = line.rstrip("\n").split("\t")
        if abs(float(rating)) >= CLEAR_RATING:
            kept.setdefault(text.strip(), {"input": text.strip(), "output": label(float(rating))})
    return list(kept.values())


def label(rating: float) -> str:
    """Return the class name of a mean rating in [-4, 4]."""
    return "positive" if rating > 0 else "negative"


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """Return disjoint test, validation and train rows; the same on every machine and Python version."""
    order = sorted(rows, key=lambda row: row["input"])
    random.Random(SEED).shuffle(order)
    held_out = TEST_ROWS + VALIDATION_ROWS
    return {"test": order[:TEST_ROWS], "validation": order[TEST_ROWS:held_out], "train": order[held_out:]}


if __name__ == "__main__":
    try:
        print(prepare())
    except GraftworkError as error:
        sys.exit(f"error: {error}")
