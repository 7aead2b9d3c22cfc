"""Every kind of file gives the same rows; a broken one gives one sentence with the line."""

import pytest

from graftwork.data.files import content_hash, read_rows
from graftwork.errors import DataError

ROWS = [{"input": 'quoted "x", and\na second line', "output": "1"}, {"input": "é 漢 ", "output": "true"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.csv", "a.tsv", "a.parquet"])
def test_every_kind_gives_the_same_rows(write, name):
    found = list(read_rows(write(name, ROWS)))
    assert [row for _, row in found] == ROWS  # "1" and "true" stay strings in CSV


def test_places_count_lines_as_an_editor_does(write):
    jsonl = write("a.jsonl", '{"input": "a"}\n\n  \n{"input": "b"}')
    assert [str(place) for place, _ in read_rows(jsonl)] == [f"{jsonl}, line 1", f"{jsonl}, line 4"]
    table = write("a.csv", ROWS)
    assert [place.number for place, _ in read_rows(table)] == [2, 4]  # the first record spans lines 2 and 3
    parquet = write("a.parquet", ROWS)
    assert [str(place) for place, _ in read_rows(parquet)] == [f"{parquet}, row 1", f"{parquet}, row 2"]


def test_byte_order_mark_is_no_part_of_the_text(write):
    assert [row for _, row in read_rows(write("a.jsonl", b'\xef\xbb\xbf{"input": "a"}\n'))] == [{"input": "a"}]
    assert [row for _, row in read_rows(write("a.csv", b"\xef\xbb\xbfinput,output\na,b\n"))] == [
        {"input": "a", "output": "b"}
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"input": "a"}\n{"input": "b",}\n', "line 2: not valid JSON .*column"),
        ("a.jsonl", b'{"input": "a"}\n{"input": "\xff"}\n', r"line 2: not UTF-8 text \(byte 12\)"),
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.csv", "input,output\na,b\nc\n", r"line 3: 1 cells, but the header names 2 \(input, output\)"),
        ("a.csv", b"input,output\na,\xff\n", "not UTF-8 text"),
        ("a.csv", 'input,output\na,"b\n', "not valid CSV"),
        ("a.csv", "input,output\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.parquet", "not parquet at all", "not a readable Parquet file"),
        ("a.parquet", "", "not a readable Parquet file"),
        ("a.txt", "x", r"unknown kind '.txt'; valid: .arrow, .csv, .json"),
    ],
)
def test_broken_files(write, name, content, said):
    with pytest.raises(DataError, match=said):
        list(read_rows(write(name, content)))


def test_a_missing_file_names_near_ones(write, tmp_path):
    write("train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"does not exist; did you mean 'train.jsonl'\?"):
        list(read_rows(str(tmp_path / "trian.jsonl")))
    with pytest.raises(DataError, match="no data file is in"):
        list(read_rows(str(tmp_path / "nowhere" / "train.jsonl")))


def test_hash_is_of_the_content(write):
    first = content_hash(write("a.jsonl", ROWS))
    assert first == content_hash(write("b.jsonl", ROWS))
    assert first != content_hash(write("a.jsonl", ROWS[:1]))
