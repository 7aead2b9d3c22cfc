"""Rows to sequences: the answer alone is learned, virtual tokens stand where asked, cuts keep what matters."""

import pytest

from graftwork.data.encoder import RowEncoder
from graftwork.data.schema import Place, parse_row
from graftwork.data.sequence import Sequence, TooLong
from graftwork.errors import DataError
from graftwork.virtual_tokens import VIRTUAL_BASE, PromptLayout, PromptSlot

HERE = Place("f.jsonl", "line", 7)


def layout(length: int, placement: str, task: str | None = None) -> PromptLayout:
    return PromptLayout((PromptSlot("p", 0, length, placement, task),))


def learn(encoder: RowEncoder, *, said="Review: fine", output="good", **more) -> Sequence:
    row = parse_row({"input": said, "output": output, **more}, HERE, answered=True)
    sequence, _ = encoder.learn([(HERE, row)])[0]
    assert sequence is not None
    return sequence


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def virtual(length: int) -> list[int]:
    return list(range(VIRTUAL_BASE, VIRTUAL_BASE + length))


@pytest.mark.fault(
    "the padding token is the end token, and both are masked: the model never learns to stop",
    "masks go by position; the end token of every answer has a label",
)
def test_only_the_answer_and_its_end_are_learned(tokenizer):
    """Pad id = EOS id, and the prompt holds an EOS: masks go by position."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    found = learn(RowEncoder(tokenizer), said="Review<|im_end|>: fine")
    prompt, answer = plain(tokenizer, "Review<|im_end|>: fine"), plain(tokenizer, " good")
    assert found.tokens == [*prompt, *answer, tokenizer.eos_token_id]
    assert tokenizer.eos_token_id in prompt
    assert found.loss == [False] * len(prompt) + [True] * (len(answer) + 1)


@pytest.mark.fault(
    "a prompt is tokenised otherwise in generation than in training (template drift)",
    "prompt and answer are tokenised apart: the ids of a training prompt are those of generation",
)
def test_training_prompts_are_generation_prompts(bos_tokenizer):
    encoder = RowEncoder(bos_tokenizer, layout(3, "prefix"), prompt_template="Review: {input}\nSentiment:")
    row = parse_row({"input": "fine", "output": "good"}, HERE, answered=True)
    learned = learn(encoder, said="fine")
    prompt, question, answer = encoder.ask([(HERE, row)])[0]
    assert (question, answer) == ("fine", "good")
    assert learned.tokens == prompt + encoder.answers(["good"])[0]


@pytest.mark.parametrize(
    ("placement", "template", "order"),
    [
        ("prefix", "{input}", "bvt"),
        ("before_bos", "{input}", "vbt"),
        ("template", "{virtual:3}{input}", "bvt"),
        ("template", "{input}{virtual:p}", "btv"),
    ],
)
def test_places_of_virtual_tokens(bos_tokenizer, placement, template, order):
    encoder = RowEncoder(bos_tokenizer, layout(3, placement), prompt_template=template)
    parts = {"b": [bos_tokenizer.bos_token_id], "v": virtual(3), "t": plain(bos_tokenizer, "Review: fine")}
    found = learn(encoder)
    head = [i for part in order for i in parts[part]]
    assert found.tokens[: len(head)] == head
    assert not any(found.loss[: len(head)])


def test_prefix_comes_first_where_no_bos_is_added(tokenizer):
    assert learn(RowEncoder(tokenizer, layout(2, "prefix"))).tokens[:2] == virtual(2)


@pytest.mark.fault(
    "the tokenizer and the template both write BOS",
    "BOS is put in one place, and not where the text begins with it",
)
def test_bos_is_never_doubled(bos_tokenizer):
    found = learn(RowEncoder(bos_tokenizer, prompt_template="<s>{input}")).tokens
    assert found.count(bos_tokenizer.bos_token_id) == 1


def test_no_end_where_none_is_wanted(tokenizer):
    assert learn(RowEncoder(tokenizer, add_eos=False)).tokens[-1] != tokenizer.eos_token_id


def test_each_row_gets_the_prompt_of_its_task(tokenizer):
    both = PromptLayout((PromptSlot("p", 0, 2, "prefix", "squad"), PromptSlot("p", 2, 3, "prefix", "mood")))
    encoder = RowEncoder(tokenizer, both)
    assert learn(encoder, task="squad").tokens[:3] == [*virtual(2), plain(tokenizer, "Review")[0]]
    assert learn(encoder, task="mood").tokens[:3] == [VIRTUAL_BASE + 2, VIRTUAL_BASE + 3, VIRTUAL_BASE + 4]
    with pytest.raises(DataError, match=r"f.jsonl, line 7: .*unknown task 'moood'.*did you mean 'mood'"):
        learn(encoder, task="moood")
    with pytest.raises(DataError, match="names no 'task'"):
        learn(encoder)
    assert learn(RowEncoder(tokenizer), task="mood").tokens  # without per-task prompts a task changes nothing


@pytest.mark.fault(
    "a row that is too long loses its answer, or its virtual tokens",
    "a cut takes prompt text on the left; seq_length counts virtual tokens too",
)
def test_cut_takes_prompt_text_from_the_left(bos_tokenizer):
    text = "one two three four five six seven"
    whole = learn(RowEncoder(bos_tokenizer, layout(3, "template"), prompt_template="{input}{virtual:3}!"), said=text)
    short = RowEncoder(bos_tokenizer, layout(3, "template"), prompt_template="{input}{virtual:3}!", seq_length=20)
    found = learn(short, said=text)
    assert len(whole) > 20 and len(found) == 20
    assert found.tokens == [whole.tokens[0], *whole.tokens[-19:]]  # BOS stays, the text's beginning goes
    assert [t for t in found.tokens if t >= VIRTUAL_BASE] == virtual(3)
    assert sum(found.loss) == sum(whole.loss)


def test_cut_spares_a_token_to_predict_the_answer_from(tokenizer):
    answer = len(plain(tokenizer, " good")) + 1
    assert len(learn(RowEncoder(tokenizer, seq_length=answer + 1))) == answer + 1
    with pytest.raises(TooLong, match=rf"f.jsonl, line 7: the answer has {answer} tokens .*seq_length={answer};"):
        learn(RowEncoder(tokenizer, seq_length=answer))
    with pytest.raises(TooLong, match="10 more must be kept"):
        learn(RowEncoder(tokenizer, layout(10, "prefix"), seq_length=answer + 9))
    assert learn(RowEncoder(tokenizer, layout(10, "prefix"), seq_length=answer + 10)).tokens[:10] == virtual(10)


def test_rows_too_long_can_be_dropped(tokenizer):
    rows = [(HERE, parse_row({"input": "a", "output": o}, HERE, answered=True)) for o in ("b", "b" * 99, "c")]
    found = RowEncoder(tokenizer, seq_length=16, too_long="drop").learn(rows)
    assert [sequence is None for sequence, _ in found] == [False, True, False]


def test_an_empty_prompt_has_nothing_to_predict_from(tokenizer, bos_tokenizer):
    with pytest.raises(DataError, match="the prompt is empty"):
        learn(RowEncoder(tokenizer), said="")
    assert learn(RowEncoder(bos_tokenizer), said="").loss[:2] == [False, True]


def test_many_rows_are_as_one_by_one(bos_tokenizer):
    encoder = RowEncoder(bos_tokenizer, layout(2, "template"), prompt_template="{input}{virtual:2}.", seq_length=30)
    rows = [(HERE, parse_row({"input": f"n {i} " * i, "output": "x" * (i + 1)}, HERE, answered=True)) for i in range(9)]
    together = encoder.learn(rows)
    assert together == [encoder.learn([row])[0] for row in rows]
    assert sum(cut for _, cut in together) > 0
