"""The data module without a trainer: batches as the contract says, whatever the number of ranks."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from graftwork.data import SFTDataModule
from graftwork.data.surroundings import Surroundings
from graftwork.errors import ConfigError, DataError, ParallelismError
from graftwork.virtual_tokens import VIRTUAL_BASE, PromptLayout, PromptSlot
from tests.helpers.reviews import REVIEWS
from tests.helpers.tiny_tokenizer import tiny_tokenizer


def rows_of(batches) -> list[list[int]]:
    return [[r for r in batch.rows.flatten().tolist() if r >= 0] for batch in batches]


@pytest.fixture
def train(write):
    return write("train.jsonl", REVIEWS)


def module(tokenizer, train, **settings) -> SFTDataModule:
    defaults = {"global_batch_size": 4, "micro_batch_size": 1, "seq_length": 64}
    return SFTDataModule(train, **{**defaults, **settings}).attach(tokenizer)


def test_padded_steps(tokenizer, train):
    loader = module(tokenizer, train).train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    for batch in batches:
        lengths = (batch.labels != -100).int().argmax(1)  # not all zero: answers are there
        assert batch.tokens.shape[0] == 4 and lengths.min() > 0
        learned = batch.labels != -100
        # The target of position t is the token at t + 1.
        assert torch.equal(batch.labels[:, :-1][learned[:, :-1]], batch.tokens[:, 1:][learned[:, :-1]])
    first = rows_of(batches)[0][0]
    answer = tokenizer.decode([t for t in batches[0].labels[0].tolist() if t != -100])
    assert answer == f" {REVIEWS[first]['output']}<|im_end|>"


@pytest.mark.fault(
    "replicas read the same rows, or other ones for another number of devices",
    "one order of rows by seed and epoch; each rank takes its share of it",
)
@pytest.mark.parametrize("packing", [False, True])
def test_the_global_batch_does_not_depend_on_the_ranks(tokenizer, train, packing):
    def step(rank: int, world: int):
        data = module(tokenizer, train, packing=packing).attach(tokenizer, rank=rank, world_size=world)
        return next(iter(data.train_dataloader())), list(data.attach(tokenizer)._evaluation("train"))

    whole, _ = step(0, 1)
    parts = [step(rank, 2)[0] for rank in range(2)]
    for name in ("tokens", "labels", "position_ids"):
        dealt = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(dealt, getattr(whole, name))


@pytest.mark.fault(
    "rows that fill the last validation batch are counted twice",
    "fills have no labels; every row counts once",
)
def test_validation_rows_count_once_on_every_number_of_ranks(tokenizer, train):
    for world in (1, 2, 4):
        loaders = [
            module(tokenizer, None, validation=train, micro_batch_size=1)
            .attach(tokenizer, rank=rank, world_size=world)
            .val_dataloader()
            for rank in range(world)
        ]
        batches = [list(loader) for loader in loaders]
        assert len({tuple(b.tokens.shape for b in own) for own in batches}) == 1  # same shapes on every rank
        assert sorted(r for own in batches for rows in rows_of(own) for r in rows) == list(range(23))


@pytest.mark.fault(
    "rows in one pack attend to each other",
    "a pack carries its boundaries, and positions start anew at each",
)
def test_packing_keeps_every_row_apart(tokenizer, train):
    data = module(tokenizer, train, packing=True, seq_length=160)
    build = data._builder("train")
    seen = []
    for bin_number in range(len(build)):
        batch = build([bin_number])
        edges = batch.cu_seqlens[0].tolist()
        rows = [r for r in batch.rows[0].tolist() if r >= 0]
        for row, start, stop in zip(rows, edges, edges[1:]):
            (alone,) = build.rows.samples([row])
            assert batch.tokens[0, start:stop].tolist() == alone.tokens.tolist()
            assert batch.labels[0, start:stop].tolist() == alone.labels.tolist()
            assert batch.position_ids[0, start:stop].tolist() == list(range(stop - start))
            assert alone.labels[-1] == -100
        assert edges[-1] == 160
        seen += rows
    assert sorted(seen) == list(range(23))
    report = data.report["train"]
    assert report["packing_efficiency"] == report["tokens"] / (160 * report["packed_rows"]) > 0.8


@pytest.mark.fault(
    "labels are not shifted by the virtual tokens, so that they are predicted",
    "virtual tokens are ids of the row, without a label",
)
def test_virtual_tokens_are_given_and_never_predicted(tokenizer, train):
    layout = PromptLayout((PromptSlot("p", 0, 5, "template"),))
    data = module(tokenizer, train, prompt_template="{input}{virtual:5}", packing=True)
    batch = next(iter(data.attach(tokenizer, prompt_layout=layout).train_dataloader()))
    virtual = batch.tokens >= VIRTUAL_BASE
    assert virtual.sum() == 5 * (batch.rows >= 0).sum()
    assert not (batch.labels >= VIRTUAL_BASE).any()
    # The last virtual token predicts the answer's first one.
    last = batch.tokens == VIRTUAL_BASE + 4
    assert (batch.labels[last] >= 0).all()


def test_lengths_follow_the_multiple(tokenizer, train):
    data = module(tokenizer, train).attach(tokenizer, pad_to_multiple=16)
    assert {batch.tokens.shape[1] % 16 for batch in data.train_dataloader()} == {0}
    packed = module(tokenizer, train, packing=True, seq_length=60).attach(tokenizer, pad_to_multiple=16)
    with pytest.raises(ParallelismError, match="seq_length must be a multiple of 16"):
        packed.train_dataloader()


def test_worker_processes_change_nothing(tokenizer, train):
    plain = list(module(tokenizer, train).train_dataloader())
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    data = module(tokenizer, train, num_workers=1)
    loader = data.train_dataloader()
    batches = iter(loader)
    found = [next(batches) for _ in range(3)]
    assert data.state_dict()["consumed_samples"] == 12  # what was handed out, not what workers prepared
    found += list(batches)
    assert torch.rand(1) == drawn  # the global random stream is not touched
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(plain, found, strict=True))


@pytest.mark.fault(
    "equal rows stand in training and validation",
    "the split goes by each row's content",
)
def test_validation_share_follows_content(tokenizer, train, write):
    data = module(tokenizer, train, validation_fraction=0.3)
    held = sorted(r for rows in rows_of(data.val_dataloader()) for r in rows)
    kept = {r for rows in rows_of(data.train_dataloader()) for r in rows}
    assert kept | set(held) == set(range(23)) and not kept & set(held)
    assert 3 <= len(held) <= 12
    # Reversed file, other seed, rows twice: the same texts are held out.
    again = module(tokenizer, write("again.jsonl", [*REVIEWS[::-1], *REVIEWS]), validation_fraction=0.3, seed=9)
    found = {r for rows in rows_of(again.val_dataloader()) for r in rows}
    assert found == {22 - r for r in held} | {23 + r for r in held}
    asked = [r for batch in again.predict_dataloader() for r in batch.rows]
    assert set(asked) == found
    with pytest.raises(DataError, match="holds out 0 of 1 rows"):
        module(tokenizer, write("one.jsonl", REVIEWS[:1]), validation_fraction=0.01).train_dataloader()


def test_predict_batches(tokenizer, write):
    path = write(
        "p.csv", [{"input": "a b", "output": "c"}, {"input": "d", "output": "e"}, {"input": "f", "output": "g"}]
    )
    data = module(tokenizer, None, predict=path, micro_batch_size=2)
    batches = list(data.predict_dataloader())
    assert [b.inputs for b in batches] == [["a b", "d"], ["f"]]
    assert [b.outputs for b in batches] == [["c", "e"], ["g"]]
    assert [b.rows for b in batches] == [[0, 1], [2]]
    assert batches[0].prompts[0] == tokenizer("a b").input_ids
    second = data.attach(tokenizer, rank=1, world_size=2).predict_dataloader()
    assert [b.rows for b in second] == [[1]]
    with pytest.raises(DataError, match="nothing to predict"):
        module(tokenizer, None).predict_dataloader()


def test_cut_and_dropped_rows_are_told_once(tokenizer, write, caplog):
    long = [{"input": "word " * 40, "output": "x"}, {"input": "a", "output": "y" * 40}, {"input": "a", "output": "x"}]
    data = module(tokenizer, write("l.jsonl", long), seq_length=20, too_long="drop")
    with caplog.at_level(logging.WARNING):
        data.train_dataloader()
        data.train_dataloader()
    assert len(caplog.records) == 1
    assert (
        "1 rows had their prompt cut on the left and 1 were dropped to fit seq_length=20 (2 rows stay)" in caplog.text
    )
    assert {k: data.report["train"][k] for k in ("rows", "truncated", "dropped")} == {
        "rows": 2,
        "truncated": 1,
        "dropped": 1,
    }
    assert data.where([2, -1]) == [f"{data.files['train']}, line 3"]


def test_state_before_and_after_the_loader(tokenizer, train):
    data = module(tokenizer, train)
    batches = iter(data.train_dataloader())
    next(batches), next(batches)
    rest = [b.rows.tolist() for b in batches]
    again = module(tokenizer, train)
    again.load_state_dict({**data.state_dict(), "consumed_samples": 8})
    assert [b.rows.tolist() for b in again.train_dataloader()][:4] == rest
    again.load_state_dict({**data.state_dict(), "consumed_samples": 8})  # with the loader there
    assert [b.rows.tolist() for b in again.train_dataloader()][:4] == rest


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"seq_length": 1}, ConfigError, "seq_length=1 is too small"),
        ({"global_batch_size": 6, "micro_batch_size": 4}, ParallelismError, "must be a multiple of 4"),
        ({"too_long": "dorp"}, ConfigError, "did you mean 'drop'"),
        ({"validation_fraction": 1.0}, ConfigError, r"in \[0, 1\)"),
        ({"validation_fraction": 0.1, "validation": "v.jsonl"}, ConfigError, "not both"),
        ({"prompt_template": "no field"}, ConfigError, "must name a field"),
    ],
)
def test_settings_are_checked_at_once(settings, error, said):
    with pytest.raises(error, match=said):
        SFTDataModule("train.jsonl", **settings)


def test_what_is_missing_is_named(tokenizer, train, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        SFTDataModule(str(tmp_path / "no.jsonl")).setup("fit")
    with pytest.raises(ConfigError, match="set tokenizer="):
        SFTDataModule(train).train_dataloader()
    with pytest.raises(DataError, match="no 'test' file; valid: train"):
        module(tokenizer, train).test_dataloader()
    with pytest.raises(ParallelismError, match="3 data-parallel ranks"):
        module(tokenizer, train).attach(tokenizer, world_size=3).train_dataloader()


def test_a_tokenizer_of_its_own(tokenizer, train, tmp_path):
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    data = SFTDataModule(train, tokenizer=str(tmp_path / "tok"), global_batch_size=4, seq_length=64)
    assert rows_of(data.train_dataloader()) == rows_of(module(tokenizer, train).train_dataloader())


@pytest.mark.fault(
    "further fields of the rows are dropped without a word",
    "fields that no template reads are named in a warning, also when the tokens come from the cache",
)
def test_fields_that_no_template_reads_are_named_once(tokenizer, write, caplog):
    rows = [{"input": f"n {i}", "output": "x", "context": "c" * (i == 3), "id": i} for i in range(8)]
    path = write("l.jsonl", rows)
    for data in (module(tokenizer, path), module(tokenizer, path)):  # the second reads the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            data.train_dataloader()
            data.train_dataloader()
        assert [r.getMessage() for r in caplog.records] == [
            f"{path}: no template reads 'context', 'id' of its rows, so a model never sees what they say; "
            "name a field in prompt_template, as {context}, or leave it out."
        ]
    caplog.clear()
    module(tokenizer, path, prompt_template="{id}{context}{input}").train_dataloader()
    assert not caplog.records


class Attached:
    """What a trainer's model tells the data: its tokenizer and its vocabulary."""

    def __init__(self, tokenizer, vocab_size):
        self.tokenizer, self.shape = tokenizer, SimpleNamespace(vocab_size=vocab_size)


def beside(model, monkeypatch):
    monkeypatch.setattr(Surroundings, "_model", property(lambda self: model))


@pytest.mark.fault(
    "rows are tokenised by another model's tokenizer",
    "a tokenizer whose ids mean other words than the model's own is refused",
)
def test_rows_of_another_tokenizer_are_refused(tokenizer, train, tmp_path, monkeypatch):
    beside(Attached(tokenizer, 300), monkeypatch)
    for name, vocabulary, changed in (("same", 300, False), ("other", 290, True)):
        tiny_tokenizer(tmp_path / name, vocabulary)
        if changed:
            file = tmp_path / name / "tokenizer.json"
            file.write_text(moved(file.read_text()))
        data = SFTDataModule(train, tokenizer=str(tmp_path / name), global_batch_size=4, seq_length=64)
        if changed:
            with pytest.raises(ConfigError, match=r"gives other ids than the model's own: \d+ of \d+ ids mean another"):
                data.train_dataloader()
        else:
            assert rows_of(data.train_dataloader()) == rows_of(module(tokenizer, train).train_dataloader())


def moved(text):
    """A tokenizer whose words have each other's ids, as those of another model."""
    rules = json.loads(text)
    words = list(rules["model"]["vocab"])
    rules["model"]["vocab"] = dict(zip(words, [*range(4), *range(len(words) - 1, 3, -1)]))
    return json.dumps(rules)


@pytest.mark.fault(
    "token ids beyond the vocabulary become zeros, or an index error on the device",
    "the largest id of the rows is compared with the model's vocabulary before training",
)
def test_ids_beyond_the_vocabulary_are_refused(tokenizer, train, tmp_path, monkeypatch):
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    beside(Attached(None, 50), monkeypatch)
    data = SFTDataModule(train, tokenizer=str(tmp_path / "tok"), global_batch_size=4, seq_length=64)
    with pytest.raises(DataError, match=r"hold the token id \d+, but the model's vocabulary ends at 49"):
        data.train_dataloader()
