"""Conversations: every assistant turn with its end token is learned, nothing else; the oracle is transformers."""

import pytest

from graftwork.data.encoder import RowEncoder
from graftwork.data.schema import Place, parse_row
from graftwork.errors import ConfigError, DataError
from graftwork.virtual_tokens import VIRTUAL_BASE, PromptLayout, PromptSlot
from tests.helpers.tiny_tokenizer import tiny_tokenizer

HERE = Place("chat.jsonl", "line", 2)
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what is 12?"},
    {"role": "assistant", "content": "a number"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes."},
]


def learn(encoder: RowEncoder, messages=TALK):
    row = parse_row({"messages": messages}, HERE, answered=True)
    sequence, _ = encoder.learn([(HERE, row)])[0]
    return sequence


def whole(tokenizer, messages, **more) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **more)
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_tokens_are_those_of_the_template(request, name):
    tokenizer = request.getfixturevalue(name)
    found = learn(RowEncoder(tokenizer))
    line_break = tokenizer("\n", add_special_tokens=False).input_ids
    assert found.tokens + line_break == whole(tokenizer, TALK)  # what follows the last end token is left out


def test_learned_are_all_assistant_turns_with_their_end(tokenizer):
    found = learn(RowEncoder(tokenizer))
    spans, now = [], []
    for token, learned in zip([*found.tokens, 0], [*found.loss, False]):
        if learned:
            now.append(token)
        elif now:
            spans, now = [*spans, tokenizer.decode(now)], []
    assert spans == ["a number<|im_end|>", "yes.<|im_end|>"]


@pytest.mark.fault(
    "the loss covers the prompt, or all turns of a conversation",
    "only what rendering an assistant's turn adds is learned, as transformers' own mask says",
)
def test_learned_are_those_transformers_marks(tmp_path):
    """Oracle: the mask of a template with generation blocks."""
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(tmp_path, chat_template=marked)
    wanted = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    found = learn(RowEncoder(tokenizer))
    length = len(found)
    assert found.tokens == wanted["input_ids"][:length]
    assert found.loss == [bool(mark) for mark in wanted["assistant_masks"][:length]]
    assert sum(found.loss) == sum(wanted["assistant_masks"]) > 0


def test_generation_starts_from_the_training_prompt(bos_tokenizer):
    encoder = RowEncoder(bos_tokenizer)
    row = parse_row({"messages": TALK}, HERE, answered=False)
    prompt, question, answer = encoder.ask([(HERE, row)])[0]
    assert prompt == whole(bos_tokenizer, TALK[:4], add_generation_prompt=True)
    assert (question, answer) == ("sure?", "yes.")
    learned = learn(encoder).tokens
    assert learned[: len(prompt)] == prompt
    open_row = parse_row({"messages": TALK[:2]}, HERE, answered=False)
    assert encoder.ask([(HERE, open_row)])[0][1:] == ("what is 12?", None)


def test_a_last_word_that_nobody_answers_is_refused(tokenizer):
    longer = [*TALK, {"role": "user", "content": "thanks"}]
    with pytest.raises(DataError, match="line 2: the last of 'messages' is the user's, and nobody answers it"):
        learn(RowEncoder(tokenizer), longer)


@pytest.mark.parametrize(
    ("placement", "name", "bos_at"), [("prefix", "bos_tokenizer", 0), ("before_bos", "bos_tokenizer", 2)]
)
def test_virtual_tokens_stand_around_bos(request, placement, name, bos_at):
    tokenizer = request.getfixturevalue(name)
    layout = PromptLayout((PromptSlot("p", 0, 2, placement),))
    found = learn(RowEncoder(tokenizer, layout)).tokens
    rest = learn(RowEncoder(tokenizer)).tokens[1:]
    head = [VIRTUAL_BASE, VIRTUAL_BASE + 1]
    head.insert(bos_at, tokenizer.bos_token_id)
    assert found == head + rest


def test_virtual_tokens_lead_where_the_turn_marker_is_no_bos(tokenizer):
    layout = PromptLayout((PromptSlot("p", 0, 2, "prefix"),))
    assert learn(RowEncoder(tokenizer, layout)).tokens[:2] == [VIRTUAL_BASE, VIRTUAL_BASE + 1]


def test_cut_keeps_the_last_answer(tokenizer):
    full = learn(RowEncoder(tokenizer))
    short = learn(RowEncoder(tokenizer, seq_length=12))
    assert short.tokens == full.tokens[-12:] and short.loss == full.loss[-12:]


def test_a_template_without_end_token_gets_one(tmp_path):
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = tiny_tokenizer(tmp_path, chat_template=bare)
    found = learn(RowEncoder(tokenizer))
    assert found.tokens[-1] == tokenizer.eos_token_id and found.loss[-1]
    assert found.tokens.count(tokenizer.eos_token_id) == 1
    assert learn(RowEncoder(tokenizer, add_eos=False)).tokens == found.tokens[:-1]


@pytest.mark.fault(
    "a chat template rewrites earlier turns, so that other tokens are learned than meant",
    "a template that does not only append is refused",
)
def test_templates_that_rewrite_the_past_are_refused(tmp_path):
    rewriting = "{% for m in messages %}{{ loop.revindex }} {{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"chat.jsonl, line 2: the chat template renders message 3 differently"):
        learn(RowEncoder(tiny_tokenizer(tmp_path, chat_template=rewriting)))


def test_templates_that_refuse_the_messages(tmp_path):
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="line 2: .*refuses the messages: roles must alternate"):
        learn(RowEncoder(tiny_tokenizer(tmp_path, chat_template=strict)))


def test_no_chat_template(tmp_path):
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        learn(RowEncoder(tiny_tokenizer(tmp_path, chat_template=None)))


def test_conversations_have_no_place_for_template_prompts(tokenizer):
    layout = PromptLayout((PromptSlot("p", 0, 2, "template"),))
    with pytest.raises(ConfigError, match="use placement='prefix'"):
        learn(RowEncoder(tokenizer, layout, prompt_template="{virtual:2}{input}"))
