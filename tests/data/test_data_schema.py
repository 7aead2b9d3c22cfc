"""Row errors name the place and the field, and say what is valid."""

import pytest

from graftwork.data.schema import Chat, Example, Place, Prompt, parse_row
from graftwork.errors import DataError

HERE = Place("train.jsonl", "line", 3)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"inptu": "a", "output": "b"}, r"'input' is missing \(did you mean 'input' where it says 'inptu'\?\)"),
        ({"input": "a", "ouput": "b"}, r"'output' is missing \(did you mean 'output' where it says 'ouput'\?\)"),
        ({"mesages": []}, r"did you mean 'messages' where it says 'mesages'"),
        ({"text": "a"}, r"'input' is missing \(it has 'text'\)"),
        ({}, r"it has no fields"),
        ({"input": "a", "output": 3}, r"field 'output': input should be a valid string, got 3"),
        ({"input": None, "output": "b"}, r"field 'input': input should be a valid string, got None"),
        ({"input": "a", "output": ""}, r"field 'output': string should have at least 1 character"),
        ({"input": "a", "output": "b", "task": 1}, r"field 'task'"),
        ({"messages": []}, r"field 'messages': list should have at least 1 item"),
        ({"messages": [{"role": "usr", "content": "x"}]}, r"field 'messages.0.role': .*'user'.*got 'usr'"),
        ({"messages": [{"role": "user", "text": "x"}]}, r"field 'messages.0.content' is missing"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"no answer to learn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, r"the first of 'messages' must not be the assistant's"),
        (["a"], r"must be an object with named fields"),
    ],
)
def test_errors_name_place_field_and_what_is_valid(row, said):
    with pytest.raises(DataError, match=said) as caught:
        parse_row(row, HERE, answered=True)
    assert str(caught.value).startswith("train.jsonl, line 3: ")
    assert "'messages', a list of" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_fields_are_kept_for_templates():
    row = parse_row({"input": "a", "output": "b", "context": "c", "task": ""}, HERE, answered=True)
    assert isinstance(row, Example)
    assert row.fields == {"input": "a", "context": "c"}
    assert row.task is None


def test_rows_to_answer_need_no_answer():
    assert parse_row({"input": "a"}, HERE, answered=False) == Prompt(input="a")
    assert isinstance(parse_row({"messages": [{"role": "user", "content": "x"}]}, HERE, answered=False), Chat)


@pytest.mark.parametrize(
    "row",
    [
        {"input": "\ud800", "output": "x"},
        {"input": "a", "output": "\udfff"},
        {"input": "a", "output": "x", "task": "\ud800"},
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]},
    ],
)
@pytest.mark.parametrize("answered", [True, False])
def test_half_of_a_surrogate_pair_is_no_text(row, answered):
    with pytest.raises(DataError, match=r"line 1: field '[\w.]+': .*(half of a surrogate pair|as a unicode string)"):
        parse_row(row, Place("f.jsonl", "line", 1), answered=answered)
