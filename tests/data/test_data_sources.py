"""Containers, directories and several files give the rows of one plain file; a damaged one gives one sentence."""

import gzip
import json
from collections import Counter

import numpy
import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from graftwork.data import SFTDataModule, json_array
from graftwork.data.blend import blended
from graftwork.data.files import read_rows
from graftwork.data.source import content_hash, read_source
from graftwork.errors import ConfigError, DataError

ROWS = [{"input": f"Review {i}: a {'fine' if i % 2 else 'dull'} film é漢", "output": str(i)} for i in range(30)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def squeezed(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def kept(source) -> list[object]:
    return [row for _, row in read_source(source)]


@pytest.fixture
def containers(write, tmp_path) -> dict[str, str]:
    """The same rows in everything that holds rows."""
    made = {
        "gz": write("a.jsonl.gz", gzip.compress(TEXT)),
        "members": write("b.jsonl.gz", gzip.compress(TEXT[:500]) + gzip.compress(TEXT[500:])),
        "zst": write("a.jsonl.zst", squeezed(TEXT)),
        "frames": write("b.ndjson.zst", squeezed(TEXT[:500]) + squeezed(TEXT[500:])),
        "array": write("a.json", json.dumps(ROWS, indent=1)),
        "dense": write("b.json", json.dumps(ROWS, ensure_ascii=False)),
        "packed array": write("a.json.gz", gzip.compress(b"\xef\xbb\xbf " + json.dumps(ROWS).encode())),
    }
    parts = tmp_path / "parts"
    parts.mkdir()
    for name, text in (("1.jsonl", TEXT[:500]), ("README.md", b"x"), ("_SUCCESS.json", b""), (".x.jsonl", b"")):
        (parts / name).write_bytes(text)
    at = TEXT[:500].rindex(b"\n") + 1
    (parts / "1.jsonl").write_bytes(TEXT[:at])
    (parts / "2.jsonl.gz").write_bytes(gzip.compress(TEXT[at:]))
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "splits"))
    return made | {
        "directory": str(parts), "saved": str(tmp_path / "saved"), "split": str(tmp_path / "splits" / "train")
    }  # fmt: skip


def test_every_container_gives_the_rows_in_their_order(containers, monkeypatch):
    for name, path in containers.items():
        assert kept(path) == ROWS, name
    monkeypatch.setattr(json_array, "BLOCK", 7)  # cuts characters, words and escapes
    for name in ("array", "dense", "packed array"):
        assert kept(containers[name]) == ROWS, name
    first = next(iter(read_source(containers["directory"])))[0]
    assert str(first).endswith("parts/1.jsonl, line 1")
    assert [str(place)[-13:] for place, _ in read_rows(containers["array"])][:2] == ["a.json, row 1", "a.json, row 2"]


DAMAGED = [
    ("a.jsonl.gz", gzip.compress(TEXT, mtime=0)[:-9], "cannot be read: Compressed file ended before the end-of-stream"),
    ("a.jsonl.gz", b"plain", "cannot be read: Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(TEXT, mtime=0)[:40] + b"\0" * 40, "cannot be read: "),
    ("a.jsonl.zst", squeezed(TEXT)[:-9], "cannot be read: Truncated compressed stream"),
    ("a.jsonl.zst", b"plain" * 9, "cannot be read: "),
    ("a.parquet.gz", b"", "unknown kind '.parquet.gz'; valid: .arrow, .csv, .*text compressed as .gz or .zst"),
    ("a.arrow", b"plain" * 9, "not a readable Arrow file"),
    ("a.json", "[]", "has no rows"),
    ("a.json", '[{"a": 1},]', "row 2: no row begins here"),
    ("a.json", '[{"a": 1} {}]', r"row 1: not valid JSON \(a comma or the array's end must follow"),
    ("a.json", '[{"a": 1}', r"row 1: not valid JSON \(a comma or the array's end must follow"),
    ("a.json", '[{"a": 1}, {"b": "x', r"row 2: not valid JSON \(Unterminated string"),
    ("a.json", '[{"a": 1}] []', "something follows the array's end"),
    ("a.json", '[{"a": 1}, {"a": ?' + " " * 99 + "}]", r"row 2: not valid JSON \(Expecting value"),
    ("a.json", '[{"a": 1, "a": 2}]', "row 1: .*the key 'a' is given twice"),
    ("a.json", "[" + '{"a":' * 5000, "nested deeper than 64 levels|not valid JSON"),
    ("a.json", b'[{"a": "\xff"}]', "not UTF-8 text"),
]


@pytest.mark.parametrize(("name", "content", "said"), DAMAGED, ids=[f"{name}: {said}" for name, _, said in DAMAGED])
def test_damaged_containers(write, name, content, said):
    with pytest.raises(DataError, match=said) as caught:
        list(read_rows(write(name, content)))
    assert "\n" not in str(caught.value)


def test_directories_and_lists_that_hold_nothing(tmp_path, containers):
    (tmp_path / "empty").mkdir()
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../a.arrow"}]}')
    for source, said in [
        (str(tmp_path / "empty"), "holds no data file; valid: .arrow, .csv"),
        (str(tmp_path / "splits"), "has the splits train; name one of them: .*splits/SPLIT"),
        (str(tmp_path / "saved"), "names the file '../a.arrow'; a plain name of a file in its directory is valid"),
        ([], "names none; give at least one"),
        (["a.jsonl", "a.jsonl"], "'a.jsonl' is named twice"),
        ("[a.jsonl,b.jsonl]", r"does not exist; names in a list need quotes: \['a.jsonl'\]"),
    ]:
        with pytest.raises(DataError, match=said):
            kept(source)


def test_the_hash_of_a_directory_is_that_of_all_its_files(tmp_path, containers):
    before = content_hash(containers["directory"])
    (tmp_path / "parts" / "README.md").write_text("other")
    assert content_hash(containers["directory"]) == before
    (tmp_path / "parts" / "2.jsonl.gz").rename(tmp_path / "parts" / "3.jsonl.gz")
    renamed = content_hash(containers["directory"])
    (tmp_path / "parts" / "3.jsonl.gz").write_bytes(gzip.compress(TEXT))
    assert len({before, renamed, content_hash(containers["directory"])}) == 3


def module(tokenizer, train, **options) -> SFTDataModule:
    return SFTDataModule(train=train, global_batch_size=4, **options).attach(tokenizer=tokenizer)


def batches(data: SFTDataModule, steps: int) -> list[list[list[int]]]:
    loader = iter(data.train_dataloader())
    return [next(loader).tokens.tolist() for _ in range(steps)]


def test_a_directory_trains_as_one_file(tokenizer, containers, write):
    plain = batches(module(tokenizer, write("a.jsonl", TEXT)), 5)
    for name in ("directory", "saved", "zst", "array"):
        assert batches(module(tokenizer, containers[name]), 5) == plain, name
    data = module(tokenizer, containers["directory"])
    assert data.where([0, 29])[0].endswith("parts/1.jsonl, line 1") and "2.jsonl.gz, line" in data.where([29])[0]


def test_weights_are_shares_of_an_epoch():
    rows = blended([30, 10, 7], [3, 2, 1], seed=5)
    counts = Counter(rows.tolist())
    shares = [sum(counts[i] for i in part) for part in (range(30), range(30, 40), range(40, 47))]
    assert shares == [30, 20, 10] and set(counts) == set(range(47))  # every row is there
    assert {counts[i] for i in range(30, 40)} == {2} and {counts[i] for i in range(40, 47)} == {1, 2}
    assert numpy.array_equal(rows, blended([30, 10, 7], [3, 2, 1], seed=5))
    assert not numpy.array_equal(rows, blended([30, 10, 7], [3, 2, 1], seed=6))
    assert numpy.array_equal(blended([3, 2], [3, 2], seed=0), numpy.arange(5))
    with pytest.raises(ConfigError, match="repeats each of the 2 rows of file 2 49500 times in an epoch"):
        blended([1000, 2], [1, 99], seed=0)


def test_a_blend_resumes_where_it_stood_and_is_of_the_runs_identity(tokenizer, write, capsys):
    files = [write("a.jsonl", ROWS[:20]), write("b.json", json.dumps(ROWS[20:]))]
    whole = batches(blend := module(tokenizer, files, train_weights=[1, 1]), 9)
    assert len(blend.train_dataloader()) == 10  # 20 rows of each file
    assert f"reading {files[0]}, {files[1]}: input/output rows (input, output), 30 rows" in capsys.readouterr().out
    first = module(tokenizer, files, train_weights=[1, 1])
    assert batches(first, 4) == whole[:4]
    second = module(tokenizer, files, train_weights=[1, 1])
    second.load_state_dict(first.state_dict())
    assert batches(second, 5) == whole[4:]
    found = [module(tokenizer, files, train_weights=w).decides() for w in ([1, 1], [2, 1], None)]
    assert found[0]["train"] == [content_hash(file) for file in files] and found[0] != found[1] != found[2]
    assert "train_weights" not in found[2] and "row_layout" not in found[2]  # states of before compare equal


@pytest.mark.parametrize(
    ("weights", "said"),
    [([1], r"train_weights has 1 number\(s\), but train names 2 file"), ([1, 0], "train_weights holds 0; whole")],
)
def test_weights_are_refused_at_once(weights, said):
    with pytest.raises(ConfigError, match=said):
        SFTDataModule(train=["a.jsonl", "b.jsonl"], train_weights=weights)
