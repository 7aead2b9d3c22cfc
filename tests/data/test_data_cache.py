"""Tokenisation happens once per content, tokenizer, template, layout and length; a failure leaves nothing behind."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from graftwork.data import encoder as encoder_room
from graftwork.data.cache import cache_key, cache_root
from graftwork.data.encoder import RowEncoder
from graftwork.data.rows import asked_rows, learned_rows
from graftwork.data.template import parse_template
from graftwork.errors import DataError
from graftwork.virtual_tokens import PromptLayout, PromptSlot
from tests.helpers.tiny_tokenizer import tiny_tokenizer

ROWS = [{"input": f"n {i}", "output": "x"} for i in range(5)]


@pytest.fixture
def encoded(monkeypatch):
    """Counts the rows that were really tokenised."""
    counted = []
    real = encoder_room.RowEncoder.learn
    monkeypatch.setattr(encoder_room.RowEncoder, "learn", lambda self, rows: counted.extend(rows) or real(self, rows))
    return counted


def entries() -> list[str]:
    return sorted(p.name for p in cache_root().iterdir() if p.is_dir())


def test_second_time_reads_the_disk(write, tokenizer, encoded):
    path = write("a.jsonl", ROWS)
    first, report = learned_rows(path, RowEncoder(tokenizer), cache_root())
    again, same = learned_rows(path, RowEncoder(tokenizer), cache_root())
    assert len(encoded) == 5
    assert report == same and report["rows"] == 5
    assert [s.tokens.tolist() for s in again.samples([3, 0])] == [s.tokens.tolist() for s in first.samples([3, 0])]
    assert first._table.cache_files[0]["filename"].startswith(str(cache_root()))  # memory-mapped, not in memory


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_template": "{input}!"},
        {"answer_template": "{output}"},
        {"seq_length": 512},
        {"add_bos": True},
        {"add_eos": False},
        {"too_long": "drop"},
        {"layout": PromptLayout((PromptSlot("p", 0, 2),))},
    ],
)
def test_every_setting_that_changes_tokens_has_its_own_entry(write, tokenizer, encoded, change):
    path = write("a.jsonl", ROWS)
    learned_rows(path, RowEncoder(tokenizer), cache_root())
    learned_rows(path, RowEncoder(tokenizer, **change), cache_root())
    assert len(encoded) == 10


@pytest.mark.fault(
    "cached tokens of another tokenizer or of the old file are used",
    "the cache's key is the content of the file, the tokenizer's rules and every setting",
)
def test_content_and_tokenizer_decide_not_names(write, tokenizer, tmp_path, encoded):
    path = write("a.jsonl", ROWS)
    learned_rows(path, RowEncoder(tokenizer), cache_root())
    learned_rows(write("b.jsonl", ROWS), RowEncoder(tokenizer), cache_root())
    assert len(encoded) == 5
    learned_rows(path, RowEncoder(tiny_tokenizer(tmp_path / "t", vocab_size=310)), cache_root())
    assert len(encoded) == 10
    learned_rows(write("a.jsonl", ROWS[:4]), RowEncoder(tokenizer), cache_root())
    assert len(encoded) == 14


def test_of_two_at_once_one_works_and_one_waits(write, tokenizer, encoded):
    path, barrier = write("a.jsonl", ROWS), threading.Barrier(2)

    def load(_):
        barrier.wait()
        return len(learned_rows(path, RowEncoder(tokenizer), cache_root())[0])

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(load, range(2))) == [5, 5]
    assert len(encoded) == 5


def test_a_bad_row_leaves_nothing(write, tokenizer):
    path = write("a.jsonl", [*ROWS, {"input": "a", "ouput": "b"}])
    with pytest.raises(DataError, match="line 6"):
        learned_rows(path, RowEncoder(tokenizer), cache_root())
    assert entries() == []


def test_a_damaged_entry_is_named(write, tokenizer):
    path = write("a.jsonl", ROWS)
    learned_rows(path, RowEncoder(tokenizer), cache_root())
    (cache_root() / entries()[0] / "report.json").write_text("{")
    with pytest.raises(DataError, match=r"is damaged .* delete it"):
        learned_rows(path, RowEncoder(tokenizer), cache_root())


def test_an_unwritable_cache_is_named(write, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written; set cache_dir"):
        learned_rows(write("a.jsonl", ROWS), RowEncoder(tokenizer), tmp_path / "file" / "tokens")


def test_all_rows_dropped(write, tokenizer):
    path = write("a.jsonl", [{"input": "a", "output": "b" * 50}])
    with pytest.raises(DataError, match="every row of .* was dropped"):
        learned_rows(path, RowEncoder(tokenizer, seq_length=8, too_long="drop"), cache_root())


def test_questions(write, tokenizer):
    rows = [{"input": "a", "output": "b"}, {"input": "c"}]
    table = asked_rows(write("a.jsonl", rows), RowEncoder(tokenizer), cache_root())
    assert table["output"][:] == ["b", None]
    assert table["row"][:] == [0, 1]


def test_no_network_is_needed(write, tokenizer, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("a socket was opened"))
    learned_rows(write("a.jsonl", ROWS), RowEncoder(tokenizer), cache_root())


def test_cache_place(monkeypatch, tmp_path):
    assert cache_root(str(tmp_path / "x")) == tmp_path / "x" / "tokens"
    monkeypatch.delenv("GRAFTWORK_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == type(tmp_path)(os.path.expanduser("~/.cache/graftwork/tokens"))


def test_cache_place_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "cache" / "tokens"  # GRAFTWORK_CACHE goes first
    monkeypatch.delenv("GRAFTWORK_CACHE")
    assert cache_root() == tmp_path / "xdg" / "graftwork" / "tokens"
    assert cache_root(str(tmp_path / "x")) == tmp_path / "x" / "tokens"


def test_keys_of_tables_written_before_stay():
    parts = {"kind": ".jsonl", "prompt": parse_template("Q: {input}{virtual:2}"), "seq_length": 512}
    assert (
        cache_key(**parts, layout=(PromptSlot("p", 0, 2),), bos_eos=[True, False]) == "af61db93756c8992234535480046d3a8"
    )


@pytest.mark.parametrize("report", ["{}", '{"rows": 5, "truncated": 0, "dropped": 0, "longest": 9}'])
def test_an_entry_of_an_earlier_version_is_written_again(write, tokenizer, encoded, report):
    path = write("a.jsonl", ROWS)
    _, first = learned_rows(path, RowEncoder(tokenizer), cache_root())
    (cache_root() / entries()[0] / "report.json").write_text(report)
    assert learned_rows(path, RowEncoder(tokenizer), cache_root())[1] == first and len(encoded) == 10


@pytest.mark.parametrize("report", ["", "[]", "{", '{"rows": {}}', "[" * 100_000, '{"unread": [1]}'])
def test_a_damaged_report_is_named(write, tokenizer, report):
    path = write("a.jsonl", ROWS)
    learned_rows(path, RowEncoder(tokenizer), cache_root())
    (cache_root() / entries()[0] / "report.json").write_text(report)
    with pytest.raises(DataError, match=r"cache entry .* is damaged \(.*\); delete it\.$"):
        learned_rows(path, RowEncoder(tokenizer), cache_root())
