"""What is said of the data before a run: the data module that then reads them is the oracle."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from graftwork.batch import IGNORED
from graftwork.data import SFTDataModule
from graftwork.data.tokenizer import Tokenizer
from graftwork.errors import DataError
from graftwork.models.shapes import Shape
from graftwork.peft import PEFT, LoRA, PromptTuning, PTuning
from graftwork.planning.problem import Problem
from graftwork.planning.rows import RowsFindings, Split, look_at_rows, prompt_layout
from tests.helpers.tiny_tokenizer import tiny_tokenizer

SHAPE = Shape(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, vocab_size=301, max_position_embeddings=256
)


def rows_of(count: int, seed: int = 0, words: int = 30) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [
        {"input": f"Row {i} of {seed}:" + " film" * draw.randrange(1, words), "output": " ".join(["sun"] * (1 + i % 3))}
        for i in range(count)
    ]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), 301)


@pytest.fixture
def data(tmp_path: Path) -> Any:
    def make(rows: list[Any], validation: list[Any] | None = None, **options: Any) -> SFTDataModule:
        files = {"train": write(tmp_path / "train.jsonl", rows)}
        if validation is not None:
            files["validation"] = write(tmp_path / "validation.jsonl", validation)
        settings = {"seq_length": 128, "cache_dir": str(tmp_path / "cache"), "global_batch_size": 4}
        return SFTDataModule(**(files | settings | options))

    return make


def split(found: RowsFindings, name: str) -> Split:
    return next(one for one in found.splits if one.name == name)


@pytest.mark.parametrize("transforms", [[], [LoRA()], [PTuning(virtual_tokens=7), PromptTuning(virtual_tokens=3)]])
@pytest.mark.parametrize("seq_length", [48, 256])
def test_lengths_and_packing_are_those_of_the_run(
    data: Any, tokenizer: Tokenizer, transforms: list[PEFT], seq_length: int
) -> None:
    module = data(rows_of(90), rows_of(20, seed=1), seq_length=seq_length, packing=True)
    found, problems = look_at_rows(module, tokenizer, SHAPE, transforms)
    assert not problems
    module.attach(tokenizer, prompt_layout(transforms))
    module.train_dataloader(), module.val_dataloader()
    for name in ("train", "validation"):
        told, real = split(found, name).lengths, module.report[name]
        assert told is not None and told.packing is not None
        assert told.packing.efficiency == real["packing_efficiency"] and told.packing.rows == real["packed_rows"]
        assert told.cut == real["truncated"] and min(told.longest, seq_length) == real["longest"]
        assert sum(count for _, count in told.histogram) == real["rows"] == split(found, name).rows
    assert (split(found, "train").lengths.cut > 0) == (seq_length == 48)


def test_padding_is_that_of_the_batches(data: Any, tokenizer: Tokenizer) -> None:
    module = data(rows_of(64, words=60))
    lengths = split(look_at_rows(module, tokenizer, SHAPE)[0], "train").lengths
    batches = list(module.attach(tokenizer).train_dataloader())
    # every row ends in a learned token, so what follows its last target is padding
    real = sum(int((row != IGNORED).nonzero().max()) + 2 for batch in batches for row in batch.labels)
    assert lengths.packing.padded_efficiency == pytest.approx(real / sum(b.tokens.numel() for b in batches), abs=1e-12)


def test_the_histogram_counts_whole_rows(data: Any, tokenizer: Tokenizer) -> None:
    module = data(rows_of(50, words=100), seq_length=64)
    lengths = split(look_at_rows(module, tokenizer)[0], "train").lengths
    long = data(rows_of(50, words=100), seq_length=4096).attach(tokenizer)
    long.train_dataloader()
    real = long._rows["train"].lengths.tolist()
    ends = [end for end, _ in lengths.histogram]
    assert ends == [16 * 2**i for i in range(len(ends))] or ends[0] > 16
    for start, (end, count) in zip([0, *ends], lengths.histogram):
        assert count == sum(start < length <= end for length in real)
    assert lengths.longest == max(real) and lengths.histogram[-1][1]


def test_sequence_to_sequence_rows_are_cut_apart(data: Any, tokenizer: Tokenizer) -> None:
    module = data(rows_of(30), seq_length=24, answer_length=4, too_long="drop")
    found, problems = look_at_rows(module, tokenizer, seq2seq=True)
    lengths = split(found, "train").lengths
    module.attach(tokenizer, decoder_start=0).train_dataloader()
    assert not problems and lengths.packing is None
    assert lengths.cut == module.report["train"]["truncated"] and lengths.unfit == module.report["train"]["dropped"]


def test_answers_that_do_not_fit(data: Any, tokenizer: Tokenizer) -> None:
    rows = [*rows_of(6), {"input": "a", "output": "sun " * 80}]
    module = data(rows, seq_length=64)
    _, problems = look_at_rows(module, tokenizer)
    with pytest.raises(DataError) as raised:
        module.attach(tokenizer).train_dataloader()
    assert [p.field for p in problems] == ["data.seq_length"] and str(raised.value) in problems[0].message
    found, problems = look_at_rows(data(rows, seq_length=64, too_long="drop"), tokenizer)
    assert not problems and "1 of 7 train rows have an answer that does not fit." in found.notes
    assert split(found, "train").lengths.unfit == 1
    _, problems = look_at_rows(data(rows[-1:], seq_length=64, too_long="drop"), tokenizer)
    assert [p.field for p in problems] == ["data.seq_length"]


BAD = {
    "misspelt": ({"inptu": "a", "output": "b"}, "did you mean 'input'"),
    "no answer": ({"input": "a"}, "'output' is missing"),
    "a field that the template names": ({"input": "a", "output": "b"}, "'review'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_malformed_row_is_told_as_the_run_would(data: Any, tokenizer: Tokenizer, kind: str) -> None:
    row, said = BAD[kind]
    rows = [{**r, "review": "x"} for r in rows_of(3)]
    module = data([*rows, row], prompt_template="{review} {input}" if "template" in kind else "{input}")
    _, problems = look_at_rows(module, tokenizer)
    with pytest.raises(DataError) as raised:
        module.attach(tokenizer).train_dataloader()
    assert problems == [Problem("data.train", str(raised.value))] and said in problems[0].message


def test_files_that_are_not_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "train.jsonl", rows_of(3))
    module = SFTDataModule(train=str(tmp_path / "trian.jsonl"), predict=str(tmp_path / "none.jsonl"))
    found, problems = look_at_rows(module, tokenizer)
    assert [p.field for p in problems] == ["data.train", "data.predict"] and not found.splits
    assert "did you mean 'train.jsonl'" in problems[0].message
    _, problems = look_at_rows(SFTDataModule(), tokenizer)
    assert problems == [Problem("data.train", "no file to learn from is named; set data.train=FILE.")]


def test_rows_of_the_validation_that_the_training_has(data: Any, tokenizer: Tokenizer) -> None:
    rows = rows_of(20)
    again = [dict(reversed(rows[3].items())), rows[7], {**rows[9], "output": "rain"}, *rows_of(5, seed=1)]
    found, problems = look_at_rows(data(rows, again), tokenizer)
    assert (found.repeated, found.asked_before) == (2, 1) and not problems
    assert any("2 of 8 validation rows are training rows too:" in note for note in found.notes)
    apart, _ = look_at_rows(data(rows, rows_of(5, seed=1)), tokenizer)
    assert (apart.repeated, apart.asked_before) == (0, 0)
    assert not [note for note in apart.notes if "training row" in note]


def test_a_held_out_part_is_the_run_s(data: Any, tokenizer: Tokenizer) -> None:
    module = data([*rows_of(40), *rows_of(40)], validation_fraction=0.3)
    found, problems = look_at_rows(module, tokenizer)
    assert not problems and found.repeated == 0, "equal rows fall on one side"
    assert split(found, "train").rows == 80 - len(module.raw_rows("validation")) == len(module.raw_rows("train"))
    _, problems = look_at_rows(data(rows_of(2), validation_fraction=1e-6), tokenizer)
    assert [p.field for p in problems] == ["data.validation_fraction"]


def test_only_the_first_rows_of_a_long_file_are_read(data: Any, tokenizer: Tokenizer) -> None:
    bad = [*rows_of(30), "no row"]
    found, problems = look_at_rows(data(bad, rows_of(3)), tokenizer, most=10)
    assert not problems and split(found, "train").rows == 10 and not split(found, "train").whole
    assert split(found, "validation").whole and found.repeated == 3
    assert any(note.startswith("3 of 3 validation rows") and "that were read" in note for note in found.notes)


def test_rows_beyond_the_model_s_ids(data: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = Shape(**{**vars(SHAPE), "vocab_size": 200})
    _, problems = look_at_rows(data(rows_of(9)), tokenizer, small)
    assert [p.field for p in problems] == ["data.train"] and "vocabulary ends at 199" in problems[0].message
    _, problems = look_at_rows(data(rows_of(9), tokenizer=str(tmp_path / "none")), None, SHAPE)
    assert [p.field for p in problems] == ["data.tokenizer"]


def test_without_a_tokenizer_rows_are_checked_and_not_measured(data: Any) -> None:
    found, problems = look_at_rows(data(rows_of(9)))
    assert not problems and split(found, "train") == Split("train", split(found, "train").file, 9, whole=True)


def test_packing_is_advised_where_padding_costs(data: Any, tokenizer: Tokenizer) -> None:
    uneven = [{"input": "a " * n, "output": "b"} for n in itertools.islice(itertools.cycle((3, 3, 3, 60)), 40)]
    advice = [n for n in look_at_rows(data(uneven), tokenizer)[0].notes if "data.packing=True" in n]
    assert len(advice) == 1 and "rows into one of 128 tokens" in advice[0]
    for module in (data(uneven, packing=True), data([{"input": "a b c", "output": "d"}] * 8)):
        assert not [n for n in look_at_rows(module, tokenizer)[0].notes if "packing" in n]
