"""Data files that are not what they were: one sentence, or exactly the rows that an independent reader finds."""

import csv
import json
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from graftwork.data.encoder import RowEncoder
from graftwork.data.files import read_rows
from graftwork.data.schema import parse_row
from graftwork.errors import DataError
from tests.fuzz.mutations import Mutation, draw, mutate, mutate_json
from tests.helpers.tiny_tokenizer import tiny_tokenizer

ROWS = [{"input": f"question {i}, “é”", "output": f"answer {i}", "context": f"so\n{i}"} for i in range(6)]
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], "source": {"id": 1}}
KINDS = (".jsonl", ".csv", ".tsv", ".parquet")
SECONDS, MEBIBYTES = 20, 1024


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> RowEncoder:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return RowEncoder(tokenizer, prompt_template="{context} {input}", seq_length=4096)


def written(directory: Path, kind: str) -> Path:
    """Write the good rows as a file of this kind; a JSONL file ends with a conversation."""
    path = directory / f"rows{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, CHAT]))
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with open(path, "w", newline="") as file:
            out = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if kind == ".tsv" else ",")
            out.writeheader()
            out.writerows(ROWS)
    return path


def damaged(directory: Path, mutation: Mutation) -> Path:
    """Damage one line of a JSONL file as JSON, or the bytes of a file of any kind."""
    if mutation.family == "bytes":
        path = written(directory, mutation.rng.choice(KINDS))
        path.write_bytes(mutate(path.read_bytes(), mutation))
        return path
    path = written(directory, ".jsonl")
    lines = path.read_bytes().splitlines()
    at = mutation.rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at].decode(), mutation).replace(b"\n", b" ")
    path.write_bytes(b"\n".join(lines))
    return path


def said_by(path: Path) -> list[Any]:
    """Return the rows as the libraries read them, without any of our checks."""
    if path.suffix == ".jsonl":
        lines = path.read_bytes().split(b"\n")
        return [json.loads(line.decode("utf-8-sig")) for line in lines if line.strip()]
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def outcome(path: Path, encoder: RowEncoder) -> str:
    """Read, check and tokenise a file: "equal", "other" (as the file now says), or "refused" in one sentence."""
    try:
        placed = list(read_rows(str(path)))
        found = encoder.learn([(place, parse_row(raw, place, answered=True)) for place, raw in placed])
    except DataError as error:
        sentence = str(error)
        assert str(path) in sentence and "\n" not in sentence and "\r" not in sentence and len(sentence) < 800, sentence
        sentence.encode()  # it can be printed
        return "refused"
    rows = [raw for _, raw in placed]
    assert rows == said_by(path) and len(found) == len(rows)
    return "equal" if rows == (ROWS if path.suffix != ".jsonl" else [*ROWS, CHAT]) else "other"


def fuzz(mutations: list[Mutation], directory: Path, encoder: RowEncoder) -> Counter[str]:
    """Return how many mutations came out how; nothing may take long, or much memory."""
    counted: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for mutation in mutations:
        path, start = damaged(directory, mutation), time.process_time()
        print(mutation, path.suffix)  # shown when it fails
        counted[outcome(path, encoder)] += 1
        assert time.process_time() - start < SECONDS, mutation
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEBIBYTES * 1024
    print(f"data files: {sum(counted.values())} tried, {dict(counted)}")
    return counted


@pytest.mark.parametrize("kind", KINDS)
def test_an_undamaged_file_is_equal(kind: str, tmp_path: Path, encoder: RowEncoder) -> None:
    assert outcome(written(tmp_path, kind), encoder) == "equal"


def test_three_hundred_mutations(tmp_path: Path, encoder: RowEncoder) -> None:
    counted = fuzz(draw(300, ("json", "bytes")), tmp_path, encoder)
    assert counted["refused"] > 150 and counted["equal"] and counted["other"]


@pytest.mark.slow
def test_five_thousand_mutations(tmp_path: Path, encoder: RowEncoder) -> None:
    counted = fuzz(draw(5000, ("json", "bytes")), tmp_path, encoder)
    assert counted["refused"] > 2500 and counted["equal"] and counted["other"]


DEEP = 100_000
FINDINGS = {
    "nested deeper than the parser's stack": ('{"input": ' + "[" * DEEP + "]" * DEEP + ', "output": "x"}', "64 levels"),
    "half a surrogate pair": ('{"input": "\\ud800", "output": "x", "context": ""}', "line 1: half of a surrogate pair"),
    "half a surrogate pair in a named field": (
        '{"input": "a", "output": "x", "context": "\\ud800"}',
        "line 1: half of a surrogate pair",
    ),
    "half a surrogate pair in a conversation": (
        json.dumps({"messages": [{"role": "user", "content": "a", "name": "\ud800"}, *CHAT["messages"][1:]]}),
        "line 1: half of a surrogate pair",
    ),
    "a number of five thousand digits": ('{"input": "a", "output": "x", "context": ' + "9" * 5000 + "}", "line 1"),
    "a number that is none": ('{"input": "a", "output": "x", "context": NaN}', "'NaN' is no finite number"),
    "a field given twice": ('{"input": "a", "input": "b", "output": "x"}', "'input' is given twice"),
    "a list of fields": ('{"input": "a", "output": "x", "context": ["b"]}', "field 'context' must be text"),
    "a million characters of name": ('{"input": "a", "' + "y" * 1_000_000 + '": "x"}', "field 'output' is missing"),
    "ten thousand names": (json.dumps({f"output{i}": i for i in range(10_000)}), "field 'input' is missing"),
    "a million characters of value": ('{"input": ["' + "y" * 1_000_000 + '"], "output": "x"}', "field 'input'"),
    "an array of rows": (json.dumps(ROWS), "a row must be an object"),
    "UTF-16": (json.dumps(ROWS[0]).encode("utf-16").decode("latin-1"), "not UTF-8 text"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_past_findings_stay_one_sentence(name: str, tmp_path: Path, encoder: RowEncoder) -> None:
    text, said = FINDINGS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode("latin-1" if name == "UTF-16" else "utf-8"))
    assert outcome(path, encoder) == "refused"
    with pytest.raises(DataError, match=said):
        encoder.learn([(place, parse_row(raw, place, answered=True)) for place, raw in read_rows(str(path))])


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.csv"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(8 * 2**30)  # sparse: eight GiB of zeros on no disk
        with pytest.raises(DataError, match=r"line 1: the line is longer than 33,554,432 characters"):
            list(read_rows(str(tmp_path / name)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: File name too long"):
        list(read_rows(str(tmp_path / ("x" * 300 + ".jsonl"))))
    (tmp_path / "directory.jsonl").mkdir()
    with pytest.raises(DataError, match="is no regular file"):
        list(read_rows(str(tmp_path / "directory.jsonl")))
    with pytest.raises(DataError, match="does not exist"):
        list(read_rows(str(tmp_path / "nul\0.jsonl")))


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("input,output,input\na,b,c\n")
    with pytest.raises(DataError, match="2 columns called 'input'; one of them is valid"):
        list(read_rows(str(path)))
