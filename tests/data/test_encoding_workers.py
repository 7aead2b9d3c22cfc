"""Rows that several processes encode are those that one encodes, in their order, and so are the errors."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork.data import encoded
from graftwork.data.cache import cache_root
from graftwork.data.encoder import RowEncoder
from graftwork.data.rows import learned_rows
from graftwork.data.workers import mapped
from graftwork.errors import DataError
from tests.helpers.doubling import work
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASKING", str(os.getpid()))


def test_results_come_in_order_from_elsewhere() -> None:
    found = list(mapped(work, range(12), 2))
    assert found == [(2 * i, False) for i in range(12)]
    assert list(mapped(work, range(3), 1)) == [(2 * i, True) for i in range(3)]


def test_an_error_is_raised_at_its_turn() -> None:
    found = mapped(work, [1, 2, 13, 4], 2)
    assert [next(found)[0], next(found)[0]] == [2, 4]
    with pytest.raises(DataError, match="thirteen"):
        next(found)


def test_what_was_read_before_a_bad_row_comes_first() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise DataError("line 3 is no row")

    found = mapped(work, items(), 2)
    assert [next(found)[0], next(found)[0]] == [2, 4]
    with pytest.raises(DataError, match="line 3"):
        next(found)


def test_a_killed_process_is_told() -> None:
    with pytest.raises(DataError, match="ended with code -9"):
        list(mapped(work, [99, 1], 2))


@pytest.mark.parametrize("seq2seq", (False, True), ids=("causal", "seq2seq"))
def test_a_large_file_becomes_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seq2seq: bool) -> None:
    rows = [
        {"input": f"question {i} " * (1 + i % 7), "output": "yes" if i % 3 else "no, never", "note": i, "adapter": name}
        for i, name in zip(range(60), ["lora", None, ["lora", "ia3"]] * 20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(encoded, "CHUNK", 7)
    encoder = RowEncoder(tiny_tokenizer(tmp_path / "tokenizer"), seq_length=24, too_long="drop", seq2seq=seq2seq)
    tables = []
    for name, large, count in (("one", 2**40, 2), ("two", 0, 2)):
        monkeypatch.setattr(encoded, "LARGE", large)
        monkeypatch.setattr(encoded, "processes", lambda count=count: count)
        found, report = learned_rows(str(tmp_path / "rows.jsonl"), encoder, cache_root(str(tmp_path / name)))
        tables.append((found._table.to_dict(), report))
    assert tables[0] == tables[1]
    assert tables[0][1]["unread"] == ["note"] and tables[0][1]["adapters"] == ["ia3", "lora"]
    assert 0 < tables[0][1]["rows"] <= 60 and tables[0][1]["truncated"] + tables[0][1]["dropped"] > 0
