"""Rows for a sequence-to-sequence model: the encoder reads the prompt, the decoder has a start and the answer."""

import json
import logging
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from graftwork.batch import IGNORED
from graftwork.data import RowEncoder, SFTDataModule
from graftwork.data.schema import Place, parse_row
from graftwork.data.sequence import TooLong
from graftwork.errors import ConfigError, DataError
from graftwork.virtual_tokens import VIRTUAL_BASE, PromptLayout, PromptSlot
from tests.helpers.reviews import REVIEWS
from tests.helpers.t5_tokenizer import t5_tokenizer

HERE = Place("f.jsonl", "line", 7)
START, END = 0, 1
TEMPLATE = "Review: {input}\nSentiment:"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return t5_tokenizer(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def train(write):
    return write("train.jsonl", REVIEWS)


def encoder(words, **options) -> RowEncoder:
    return RowEncoder(words, options.pop("layout", None), seq2seq=True, **options)


def learn(made: RowEncoder, said="the movie was dull", output="good picture"):
    row = parse_row({"input": said, "output": output}, HERE, answered=True)
    ((found, _),) = made.learn([(HERE, row)])
    return found.tokens[: found.answer_start], found.tokens[found.answer_start :]


def module(words, train, **settings) -> SFTDataModule:
    defaults = {"global_batch_size": 4, "micro_batch_size": 1, "seq_length": 64, "prompt_template": TEMPLATE}
    return SFTDataModule(train, **{**defaults, **settings}).attach(words, decoder_start=START)


def layout(length: int, placement: str) -> PromptLayout:
    return PromptLayout((PromptSlot("p", 0, length, placement),))


def test_rows_are_those_of_the_tokenizer_itself(words):
    """transformers' own call is the oracle, for the encoder's side and for the decoder's (``text_target``)."""
    for said, output in [("the movie was dull", "good picture"), ("a girl, 12", "x"), ("", "a  b")]:
        prompt, answer = learn(encoder(words, prompt_template=TEMPLATE), said, output)
        assert prompt == words(TEMPLATE.format(input=said)).input_ids and prompt[-1] == END
        assert answer == words(text_target=output).input_ids
        assert encoder(words).answers([output]) == [answer]


def test_training_prompts_are_generation_prompts(words):
    made = encoder(words, prompt_template=TEMPLATE, layout=layout(3, "prefix"))
    row = parse_row({"input": "the sun", "output": "good"}, HERE, answered=True)
    ((prompt, question, right),) = made.ask([(HERE, row)])
    assert (question, right) == ("the sun", "good") and prompt == learn(made, "the sun")[0]


@pytest.mark.parametrize(
    ("placement", "template", "order"),
    [("prefix", "{input}", "vte"), ("before_bos", "{input}", "vte"), ("template", "{input}{virtual:3}", "tve")],
)
def test_virtual_tokens_stand_in_the_source_before_its_end(words, placement, template, order):
    prompt, answer = learn(encoder(words, layout=layout(3, placement), prompt_template=template))
    virtual = [VIRTUAL_BASE + i for i in range(3)]
    parts = {"v": virtual, "t": words("the movie was dull").input_ids[:-1], "e": [END]}
    assert prompt == [i for part in order for i in parts[part]]
    assert max(answer) < len(words)


def test_the_end_is_written_once_and_only_where_the_tokenizer_writes_it(words, tmp_path):
    assert learn(encoder(words, prompt_template="{input}</s>"))[0].count(END) == 1
    plain = t5_tokenizer(tmp_path, closes=False)
    prompt, answer = learn(encoder(plain))
    assert END not in prompt and answer[-1] == END
    assert END not in learn(encoder(plain, add_eos=False))[1]
    with pytest.raises(DataError, match=r"line 7: the prompt is empty, nothing precedes the answer; fill it\."):
        learn(encoder(plain), said="")


def test_text_after_a_marker_goes_on_without_a_space(words):
    made = encoder(words, layout=layout(2, "template"), prompt_template="{input}{virtual:2}: dull")
    assert words.decode([i for i in learn(made, "the movie")[0] if i < VIRTUAL_BASE]) == "the movie: dull</s>"


def test_each_side_has_its_own_length(words):
    said = "one two three four five six seven eight nine ten"
    made = {"layout": layout(3, "template"), "prompt_template": "{input}{virtual:3}!"}
    whole, answer = learn(encoder(words, **made), said)
    cut, same = learn(encoder(words, **made, seq_length=12, answer_length=len(answer)), said)
    assert len(whole) > 12 == len(cut) and cut == whole[-12:] and same == answer
    assert learn(encoder(words, **made, seq_length=5), said, "a")[0] == whole[-5:]  # what is not text, and "!"
    with pytest.raises(TooLong, match=rf"line 7: the answer has {len(answer)} tokens, .*answer_length=2; raise answer"):
        learn(encoder(words, answer_length=2))
    with pytest.raises(TooLong, match="11 tokens of the prompt must be kept, .*seq_length=8; raise seq_length"):
        learn(encoder(words, layout=layout(10, "prefix"), seq_length=8), output="a")
    dropping = encoder(words, seq_length=40, answer_length=4, too_long="drop")
    rows = [(HERE, parse_row({"input": "a", "output": o}, HERE, answered=True)) for o in ("b", "b" * 9, "c")]
    assert [found is None for found, _ in dropping.learn(rows)] == [False, True, False]


def test_a_prompt_of_text_alone_keeps_a_token(tmp_path):
    plain = t5_tokenizer(tmp_path, closes=False)
    assert len(learn(encoder(plain, seq_length=2), said="the movie was dull", output="a")[0]) == 2


def test_batches_hold_sources_and_shifted_answers(words, train):
    data = module(words, train)
    seen = []
    for batch in data.train_dataloader():
        assert batch.source.dtype == batch.source_lengths.dtype == torch.int64 and not batch.packed
        for row, source, length, tokens, labels in zip(
            batch.rows[:, 0].tolist(), batch.source, batch.source_lengths, batch.tokens, batch.labels
        ):
            prompt = words(TEMPLATE.format(input=REVIEWS[row]["input"])).input_ids
            answer = words(text_target=REVIEWS[row]["output"]).input_ids
            assert source[:length].tolist() == prompt and not source[length:].any()
            wide = len(tokens) - len(answer)
            assert tokens.tolist() == [START, *answer[:-1], *[0] * wide]
            assert labels.tolist() == [*answer, *[IGNORED] * wide]
        assert batch.source.shape[1] == batch.source_lengths.max()
        seen += batch.rows[:, 0].tolist()
    assert sorted(set(seen)) == list(range(23))
    report = data.report["train"]
    assert report["answer_tokens"] == sum(len(words(r["output"]).input_ids) for r in REVIEWS)


def test_ranks_share_the_global_batch_and_its_lengths(words, train):
    def first(rank, world):
        data = module(words, train).attach(words, rank=rank, world_size=world, pad_to_multiple=4, decoder_start=START)
        return next(iter(data.train_dataloader()))

    whole, parts = first(0, 1), [first(rank, 2) for rank in range(2)]
    assert whole.source.shape[1] % 4 == whole.tokens.shape[1] % 4 == 0
    for name in ("tokens", "labels", "position_ids", "source", "source_lengths", "rows"):
        dealt = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(dealt, getattr(whole, name))


def test_rows_that_fill_a_batch_are_read_and_never_counted(words, train):
    *_, last = (
        module(words, None, validation=train).attach(words, world_size=2, rank=1, decoder_start=5).val_dataloader()
    )
    fill = last.rows[:, 0] == -1
    assert fill.any() and (last.labels[fill] == IGNORED).all()
    assert last.source_lengths.min() == 1 and (last.tokens[:, 0] == 5).all()


def test_what_is_cached_for_one_kind_is_not_read_by_the_other(words, train):
    causal = next(iter(module(words, train).attach(words).train_dataloader()))
    pairs = next(iter(module(words, train).train_dataloader()))
    short = next(iter(module(words, train, answer_length=9, too_long="drop").train_dataloader()))
    assert causal.source is None and pairs.source is not None and short.source is not None
    again = next(iter(module(words, train).train_dataloader()))
    assert torch.equal(again.source, pairs.source) and torch.equal(again.tokens, pairs.tokens)
    assert torch.equal(next(iter(module(words, train).attach(words).train_dataloader())).tokens, causal.tokens)


def test_worker_processes_and_predictions(words, train):
    plain, worked = (list(module(words, train, num_workers=n).train_dataloader()) for n in (0, 1))
    assert all(torch.equal(a.source, b.source) and torch.equal(a.tokens, b.tokens) for a, b in zip(plain, worked))
    asked = next(iter(module(words, None, predict=train).predict_dataloader()))
    assert asked.prompts[0] == words(TEMPLATE.format(input=REVIEWS[0]["input"])).input_ids


def test_what_was_cut_and_dropped_is_told(words, write, caplog):
    rows = [{"input": "word " * 40, "output": "x"}, {"input": "a", "output": "y" * 40}, {"input": "a", "output": "x"}]
    data = module(words, write("l.jsonl", rows), seq_length=20, answer_length=8, too_long="drop")
    with caplog.at_level(logging.WARNING):
        data.train_dataloader()
    assert "cut on the left and 1 were dropped to fit seq_length=20, answer_length=8 (2 rows stay)" in caplog.text
    assert data.report["train"]["truncated"] == 1


def test_the_answers_length_decides_what_a_run_computes(words, train):
    same, other = (module(words, train, answer_length=n).decides() for n in (8, 9))
    assert same["answer_length"] == 8 and {k for k in same if same[k] != other[k]} == {"answer_length"}


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_what_has_no_meaning_for_the_kind_is_refused_before_rows_are_read(words, train, write):
    with pytest.raises(ConfigError, match="packing=True is not for sequence-to-sequence models; set packing=False"):
        module(words, train, packing=True).setup("fit")
    with pytest.raises(ConfigError, match="add_bos=True is not for sequence-to-sequence models"):
        module(words, train, add_bos=True).setup("fit")
    with pytest.raises(ConfigError, match="answer_length=9 is for sequence-to-sequence models; .* leave answer_length"):
        module(words, train, answer_length=9).attach(words).train_dataloader()
    with pytest.raises(ConfigError, match="answer_length=0 is too small; it must be at least 1"):
        SFTDataModule(train, answer_length=0)
    told = "the row holds 'messages', but a sequence-to-sequence model learns from rows with 'input' and 'output'"
    chats = write("chat.jsonl", [CHAT] * 4)
    for refused in (lambda d: d.setup("fit"), lambda d: d.train_dataloader(), lambda d: d.questions("train")):
        with pytest.raises(DataError, match=f"chat.jsonl, line 1: {told}"):
            refused(module(words, chats))
    late = write("late.jsonl", [*REVIEWS[:2], CHAT])
    with pytest.raises(DataError, match=r"late.jsonl, line 3: the row belongs to conversations \(messages\)"):
        module(words, late).train_dataloader()


class Reader(pl.LightningModule):
    """Stands where a model with a decoder stands; notes whether it was built and what it read."""

    seq2seq = True

    def __init__(self, words):
        super().__init__()
        self.tokenizer, self.shape = words, SimpleNamespace(vocab_size=len(words), decoder_start_token_id=7)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.built, self.read = False, []

    def configure_model(self):
        self.built = True

    def training_step(self, batch, index):
        self.read.append(batch)
        return self.weight * batch.tokens.shape[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model, data, tmp_path):
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)


def test_the_trainers_model_says_what_kind_it_is(words, train, write, tmp_path):
    model = Reader(words)
    fit(model, SFTDataModule(train, global_batch_size=4, seq_length=64), tmp_path)
    assert all((batch.tokens[:, 0] == 7).all() and batch.source is not None for batch in model.read)


@pytest.mark.parametrize("seq2seq", [True, False])
def test_refusals_come_before_the_model_is_built(words, train, write, tmp_path, seq2seq):
    wrong = [SFTDataModule(train, packing=True), SFTDataModule(write("chat.jsonl", [CHAT]))]
    for data in wrong if seq2seq else [SFTDataModule(train, answer_length=5)]:
        model = Reader(words)
        model.seq2seq = seq2seq
        with pytest.raises((ConfigError, DataError), match="sequence-to-sequence"):
            fit(model, data, tmp_path)
        assert not model.built


def test_the_format_that_travels_with_an_adapter_is_that_of_the_options(words, train):
    """The kind of the model is the model's: what is saved says nothing of it, so old adapters stay readable."""
    assert json.loads(json.dumps(module(words, train).prompt_format)) == {
        "prompt_template": TEMPLATE, "answer_template": " {output}", "add_bos": None, "add_eos": True,
    }  # fmt: skip
