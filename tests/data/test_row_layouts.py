"""Rows in the layouts that people have become the tokens of the same rows in ours; what fits two of them is refused."""

import json

import pytest

from graftwork.data.encoder import RowEncoder
from graftwork.data.place import Place
from graftwork.data.row_layout import LAYOUTS, in_one_layout, layout_of
from graftwork.data.schema import parse_row
from graftwork.errors import ConfigError, DataError
from tests.helpers.tiny_tokenizer import tiny_tokenizer

HERE = Place("f.jsonl", "line", 1)
ALPACA = {"instruction": "Translate.", "input": "cat", "output": "chat"}
PAIR = {"input": "Translate.\ncat", "output": "chat"}
COMPLETION = {"prompt": "Translate.\ncat", "completion": "chat"}
TALK = [("system", "be kind"), ("human", "12?"), ("gpt", "a number"), ("observation", "{}"), ("gpt", "yes.")]
SHAREGPT = {"conversations": [{"from": who, "value": said} for who, said in TALK]}
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
MESSAGES = {"messages": [{"role": ROLES.get(who, who), "content": said} for who, said in TALK]}
ROWS = {"input_output": PAIR, "alpaca": ALPACA, "prompt_completion": COMPLETION, "messages": MESSAGES}
ROWS |= {"sharegpt": SHAREGPT}


def learned(tokenizer, raw, **options):
    row = parse_row(raw, HERE, answered=True, **options)
    return RowEncoder(tokenizer).learn([(HERE, row)])[0][0]


def asked(tokenizer, raw):
    return RowEncoder(tokenizer).ask([(HERE, parse_row(raw, HERE, answered=False))])[0]


def test_every_layout_is_told_by_its_columns():
    assert {name: layout_of(row, HERE).name for name, row in ROWS.items()} == {name: name for name in LAYOUTS}
    assert layout_of({"instruction": "a", "input": "b"}, HERE).name == "alpaca"  # to answer
    assert layout_of({"prompt": "a"}, HERE).name == "prompt_completion"
    assert layout_of({"input": "a", "output": "b", "prompt": "c", "text": "d"}, HERE).name == "input_output"


@pytest.mark.parametrize(("theirs", "ours"), [(ALPACA, PAIR), (COMPLETION, PAIR), (SHAREGPT, MESSAGES)])
def test_tokens_and_loss_are_those_of_the_same_row_in_ours(tokenizer, theirs, ours):
    assert learned(tokenizer, theirs) == learned(tokenizer, ours)
    assert asked(tokenizer, theirs) == asked(tokenizer, ours)
    assert (
        asked(tokenizer, {k: v for k, v in theirs.items() if k not in ("output", "completion")})[0]
        == (asked(tokenizer, ours)[0])
    )
    assert sum(learned(tokenizer, theirs).loss) > 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_task_and_adapter_hold_in_every_layout(name):
    row = parse_row({**ROWS[name], "task": "t", "adapter": ["a", "b"]}, HERE, answered=True)
    assert (row.task, row.way) == ("t", frozenset("ab"))


CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
CHATS = [
    [{"role": "user", "content": "a"}, CALL, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "b"}],
    [{"role": "system", "content": "s"}, *({"role": r, "content": r[0]} for r in ("user", "assistant") * 3)],
]


@pytest.mark.parametrize("messages", CHATS, ids=["tools", "turns"])
def test_learned_are_the_turns_that_transformers_marks(tmp_path, messages):
    """Oracle: the mask of a template with generation blocks, tools and calls of them included."""
    marked = (
        "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] or '' }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c['function']['name'] }}{% endfor %}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer, tools = tiny_tokenizer(tmp_path, chat_template=marked), [{"name": "add"}]
    found = learned(tokenizer, {"messages": messages, "tools": tools})
    wanted = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    length = len(found)
    assert found.tokens == wanted["input_ids"][:length]
    assert found.loss == [bool(mark) for mark in wanted["assistant_masks"][:length]]
    assert sum(found.loss) == sum(wanted["assistant_masks"]) > len(messages) // 2


def test_an_answer_of_weight_0_is_read_and_not_learned(tokenizer):
    turns = [dict(turn) for turn in MESSAGES["messages"]]
    turns[2]["weight"], whole = 0, learned(tokenizer, MESSAGES)
    found = learned(tokenizer, {"messages": turns})
    assert found.tokens == whole.tokens
    assert tokenizer.decode([t for t, loss in zip(found.tokens, found.loss) if loss]) == "yes.<|im_end|>"
    turns[4]["weight"] = 0
    with pytest.raises(DataError, match="every answer has the weight 0"):
        learned(tokenizer, {"messages": turns})


def test_nulls_of_a_table_are_no_fields():
    """Arrow gives every message of a column the fields that one of them has."""
    turns = [{**turn, "name": None, "tool_calls": None, "weight": None} for turn in MESSAGES["messages"]]
    assert parse_row({"messages": turns}, HERE, answered=True) == parse_row(MESSAGES, HERE, answered=True)


def test_parts_of_text_are_one_text_and_tools_may_be_a_string_of_json():
    """As OpenAI writes contents, and as data sets of one schema keep tools."""
    turns = [
        {**turn, "content": [{"type": "text", "text": part, "image_url": None} for part in (said[:1], said[1:])]}
        for turn in MESSAGES["messages"]
        for said in (turn["content"],)
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    wanted = parse_row({**MESSAGES, "tools": tools}, HERE, answered=True)
    assert parse_row({"messages": turns, "tools": json.dumps(tools)}, HERE, answered=True) == wanted
    assert parse_row({**MESSAGES, "tools": ""}, HERE, answered=True).tools is None


IMAGE = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "cat.png"}}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": IMAGE}]}, "'messages.0.content': part 2 is 'image_url', and only"),
        ({**MESSAGES, "tools": "[{"}, "field 'tools': the string is not valid JSON"),
        ({**MESSAGES, "tools": "[" * 100_000}, "field 'tools': the string is nested deeper than 64 levels"),
        ({**MESSAGES, "tools": '[{"a": 1, "a": 2}]'}, "field 'tools': the string is not valid JSON: .*twice"),
        ({**MESSAGES, "tools": '["\ud800"]'}, "field 'tools': half of a surrogate pair"),
        ({**MESSAGES, "tools": "{}"}, "field 'tools': input should be a valid list, got {}"),
        ({**ALPACA, **SHAREGPT}, r"read as Alpaca rows .* or ShareGPT .*set row_layout to 'alpaca' or 'sharegpt'\.$"),
        ({**PAIR, **COMPLETION}, "set row_layout to 'input_output' or 'prompt_completion'"),
        ({"conversations": [{"from": "bob", "value": "x"}]}, r"'from' of turn 1 is 'bob' \(valid: system, human, user"),
        ({"conversations": [{"value": "x"}]}, "'from' of turn 1 is missing"),
        ({"conversations": [{"from": "human"}]}, "'value' of turn 1 is missing"),
        ({"conversations": SHAREGPT["conversations"][:2]}, "none of 'conversations' is the assistant's"),
        ({"conversations": SHAREGPT["conversations"][:4]}, "the last of 'conversations' is the tool's, and nobody"),
        ({"messages": MESSAGES["messages"][:4]}, "the last of 'messages' is the tool's, and nobody answers it"),
        ({"prompt": ["a"], "completion": "b"}, r"field 'prompt': input should be a valid string, got \['a'\]"),
        ({"prompt": "a", "completion": ""}, "field 'completion': string should have at least 1 character"),
        ({"instruction": "a"}, "field 'output' is missing .*; an Alpaca row holds"),
        ({"instruction": 3, "output": "b"}, "field 'instruction': input should be a valid string, got 3"),
        ({"instruction": "\ud800", "output": "b"}, "line 1: field 'instruction': .*surrogate"),
    ],
)
def test_a_row_that_is_wrong_is_one_sentence(row, said):
    with pytest.raises(DataError, match=said) as caught:
        parse_row(row, HERE, answered=True)
    assert str(caught.value).startswith("f.jsonl, line 1: ") and "\n" not in str(caught.value)


def test_a_layout_that_is_named_decides(tokenizer):
    both = {**ALPACA, **SHAREGPT}
    assert learned(tokenizer, both, layout="sharegpt") == learned(tokenizer, SHAREGPT)
    assert learned(tokenizer, both, layout="alpaca") == learned(tokenizer, ALPACA)
    assert learned(tokenizer, ALPACA, layout="input_output") == learned(tokenizer, {"input": "cat", "output": "chat"})
    with pytest.raises(ConfigError, match=r"row_layout='alpca' is unknown; did you mean 'alpaca'\?"):
        parse_row(both, HERE, answered=True, layout="alpca")


def test_a_file_keeps_to_one_layout():
    rows = [(HERE._replace(number=n), row) for n, row in enumerate([ALPACA, ALPACA, COMPLETION], 1)]
    assert list(in_one_layout(rows[:2])) == rows[:2] and list(in_one_layout(rows, "alpaca")) == rows
    said = r"f.jsonl, line 3: the row belongs to prompt/completion rows .*from line 1 on to Alpaca rows .*a file each"
    with pytest.raises(DataError, match=said):
        list(in_one_layout(rows))
