"""A reader's desk: a directory with data files and a base model named as the pages name it, tiny and random."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork import parallel
from graftwork.models.weights.hub import REGISTERED
from graftwork.models.weights.seal import seal
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

LABELS = {"warm": "positive", "dull": "negative"}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA-type checkpoint with a tokenizer, under the name the cache gives the converted smollm2_135m."""
    cache = tmp_path_factory.mktemp("cache")
    directory = cache / "models" / f"smollm2_135m-{REGISTERED['smollm2_135m'].sha256[:16]}"
    make_tiny("llama_tied", directory, vocab_size=300, max_position_embeddings=512)
    tiny_tokenizer(directory)
    seal(directory)
    return directory


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh working directory with train, validation and test rows."""
    monkeypatch.chdir(tmp_path)
    numbered = [(i, word) for i in range(12) for word in LABELS]
    rows = [{"input": f"a {word} film, number {i}", "output": LABELS[word]} for i, word in numbered]
    for name, part in (("train", rows[:16]), ("validation", rows[16:20]), ("test", rows[20:])):
        tmp_path.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    yield tmp_path
    parallel.destroy()


@pytest.fixture
def small_desk(desk: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where ``smollm2_135m`` is tiny."""
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tiny_base.parents[1]))
    return desk
