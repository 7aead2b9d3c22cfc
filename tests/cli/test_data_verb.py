"""``nemorun graft data``: what it prints and draws, and its exit codes; the data module that trains is the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest

import graftwork.cli  # noqa: F401  registers recipes and methods
from graftwork.cli.data import DataContext, data
from graftwork.data import SFTDataModule
from tests.helpers.tiny_tokenizer import tiny_tokenizer

ROWS = [{"instruction": f"Say {i} films.", "input": "film " * (i % 9), "output": f"answer {i}"} for i in range(60)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_tokenizer(tmp_path / "words")
    for name, rows in (("train", [*ROWS, ROWS[0]]), ("test", [*ROWS[:2], {**ROWS[3], "output": "\x1b[31mother"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(*args: str, **options: Any) -> None:
    DataContext(name="data", **options).cli_execute(data, [*args, "tokenizer=words"])


def test_it_says_what_a_run_would_do_with_the_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute("train.jsonl", "validation=test.jsonl", "seq_length=32", "rows=2", "output=lengths.png")
    out = capsys.readouterr().out
    real = SFTDataModule("train.jsonl", tokenizer="words", seq_length=32, packing=True, cache_dir="cache")
    real.train_dataloader()
    report = real.report["train"]
    assert "train: train.jsonl: Alpaca rows (instruction, input, output), 61 rows" in out and report["truncated"] > 0
    assert f"seq_length=32: {report['truncated']:,} of 61 rows" in out
    assert f"packed: {report['packed_rows']} rows of 32 tokens, {report['packing_efficiency']:.1%} full" in out
    assert "twice: 1 within train; 2 of validation in train too; 1 of validation asked in train, with another" in out
    assert "train.jsonl, line 1, " in out and "Say 0 films.« answer 0<|im_end|>»" in out and "line 3, " not in out
    assert "\x1b" not in out and out.rstrip().endswith("no problems found\n\nwritten: lengths.png")
    assert (place / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("quiet", [None, "1"])
def test_colours_are_for_terminals_only(
    place: Path, quiet: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if quiet:
        monkeypatch.setenv("NO_COLOR", quiet)
    execute("test.jsonl")
    out = capsys.readouterr().out
    assert ("\x1b[1;32m answer 0<|im_end|>\x1b[0m" in out) == (quiet is None)
    assert "\x1b[31m" not in out and "\\x1b[31mother" in out  # what rows hold commands no terminal


def test_rows_that_would_stop_a_run_end_with_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mixed.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"prompt": "a", "completion": "b"}\n')
    for args, said in [
        (["mixed.jsonl"], "mixed.jsonl, line 2: the row belongs to prompt/completion rows"),
        (["trian.jsonl"], "did you mean 'train.jsonl'"),
        (["train.jsonl", "row_layout=sharegpt"], "line 1: field 'conversations' is missing"),
        (["train.jsonl", "limit=0"], "limit=0 is not valid: a whole number from 1 on"),
        (["train.jsonl", "seq_lenght=3"], "seq_length"),
        (["train.jsonl", "train_weights=[1,2]"], "train_weights has 2 number(s), but train names 1 file"),
        ([], "no file to learn from is named"),
    ]:
        with pytest.raises(SystemExit) as ended:
            execute(*args)
        told = capsys.readouterr()
        assert ended.value.code == 2 and said in told.err and told.err.startswith("error: ") and told.out == ""
        assert len(told.err.splitlines()) == 1
    with pytest.raises(SystemExit) as ended:
        execute("train.jsonl", "seq_length=4")
    assert ended.value.code == 2 and "problem: data.seq_length: 61 of 61 rows do not fit" in capsys.readouterr().out
