"""The demo's data: built from a source distribution, split the same everywhere, refused when damaged."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from graftwork.errors import DataError

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples/sentiment/prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load()


def tar(path: Path, name: str, content: bytes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return path


def sdist(folder: Path, lines: list[str]) -> Path:
    inner = tar(folder / "inner.tar.gz", prepare.REVIEWS, "\n".join(lines).encode())
    return tar(folder / prepare.SDIST, prepare.INNER, inner.read_bytes())


def reviews(count: int) -> list[str]:
    return [f"{i}\t{(-1) ** i * 2.5}\treview number {i} café" for i in range(count)]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_clear_reviews_become_disjoint_splits(tmp_path: Path) -> None:
    lines = [*reviews(400), "400\t0.99\tneither here nor there", "401\t2.5\treview number 0 café"]
    out = prepare.prepare(tmp_path / "out", sdist(tmp_path, lines))
    parts = {name: read(out / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 136, "validation": 64, "test": 200}
    texts = [row["input"] for part in parts.values() for row in part]
    assert len(set(texts)) == 400 and "neither here nor there" not in texts
    odd = {row["output"] for row in parts["test"] if int(row["input"].split()[2]) % 2}
    even = {row["output"] for row in parts["test"]} - odd
    assert (odd, even) == ({"negative"}, {"positive"})


def test_splits_do_not_depend_on_the_order_of_the_file() -> None:
    rows = prepare.rows(reviews(400))
    assert prepare.split(rows) == prepare.split(rows[::-1])


def test_a_made_data_set_is_not_made_again(tmp_path: Path) -> None:
    out = prepare.prepare(tmp_path / "out", sdist(tmp_path, reviews(400)))
    assert prepare.prepare(out, tmp_path / "no such file") == out


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    broken = tmp_path / prepare.SDIST
    broken.write_bytes(sdist(tmp_path, reviews(400)).read_bytes()[:200])
    with pytest.raises(DataError, match="is damaged"):
        prepare.prepare(tmp_path / "out", broken)
    assert not (tmp_path / "out").exists()


def test_without_cache_and_index_the_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    for name in ("PIP_CONFIG_FILE", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "/dev/null" if name == "PIP_CONFIG_FILE" else "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=f"{prepare.SDIST} is not in {tmp_path}/downloads"):
        prepare.prepare()
