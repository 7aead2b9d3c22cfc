"""Templates: fields, literal braces, and virtual tokens that each stand exactly once."""

import pytest

from graftwork.data.schema import Alpaca, Chat, Place, Prompt
from graftwork.data.template import Piece, PromptTemplate, TaskTemplates, check_templates
from graftwork.errors import ConfigError, DataError
from graftwork.virtual_tokens import VIRTUAL_BASE, PromptLayout, PromptSlot

HERE = Place("f.jsonl", "line", 1)
ROW = Prompt.model_validate({"input": "a {virtual:3} {x}", "context": "c", "score": 2, "tags": ["t"]})


def layout(*slots: tuple[str, int, str | None]) -> PromptLayout:
    offset, made = 0, []
    for name, length, task in slots:
        made.append(PromptSlot(name, offset, length, "template", task))
        offset += length
    return PromptLayout(tuple(made))


def ids(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(VIRTUAL_BASE + start, VIRTUAL_BASE + stop))


def pieces(prompt: str, slots: PromptLayout | None = None, row: Prompt = ROW) -> list[Piece]:
    return PromptTemplate(prompt, " {output}", slots or PromptLayout()).prompt_pieces(row, HERE)


def test_text_and_fields_are_one_text_and_the_data_are_no_template():
    assert pieces("{{{context}}} {input}: {score}") == [Piece("{c} a {virtual:3} {x}: 2")]


def test_markers_take_virtual_tokens_in_turn():
    found = pieces("{virtual:2}{context} {virtual:3}!", layout(("p", 5, None)))
    assert found == [Piece(ids=ids(0, 2)), Piece("c "), Piece(ids=ids(2, 5)), Piece("!")]


def test_markers_take_adapters_by_name():
    found = pieces("{virtual:b}{context}{virtual:2}", layout(("a", 2, None), ("b", 3, None)))
    assert found == [Piece(ids=ids(2, 5)), Piece("c"), Piece(ids=ids(0, 2))]


def test_each_task_has_its_own_length():
    template = PromptTemplate("{virtual:p}{context}", "{output}", layout(("p", 2, "squad"), ("p", 3, "mood")))
    assert template.markers("squad") == [ids(0, 2)]
    assert template.markers("mood") == [ids(2, 5)]


@pytest.mark.parametrize(
    ("prompt", "slots", "said"),
    [
        ("{virtual:4}{input}", layout(("p", 5, None)), "places 4 virtual tokens by count.*have 5"),
        ("{virtual:6}{input}", layout(("p", 5, None)), "places 6 .*have 5"),
        ("{input}", layout(("p", 5, None)), "places 0 .*have 5"),
        ("{virtual:5}{input}", PromptLayout(), "places 5 .*have 0"),
        ("{virtual:q}{input}", layout(("pq", 5, None)), "no prompt adapter 'q'.*did you mean 'pq'"),
    ],
)
def test_virtual_tokens_must_match_the_adapters(prompt, slots, said):
    with pytest.raises(ConfigError, match=said):
        pieces(prompt, slots)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("Review {input", "literal braces"),
        ("a } {input}", "literal braces"),
        ("{}", "not a placeholder"),
        ("{input!r}", "{input!r} is not a placeholder"),
        ("{input:>9}", "{input:>9} is not a placeholder"),
        ("{input.real}", "not a placeholder"),
        ("{virtual}{input}", "{virtual} is not a placeholder"),
        ("no field", "must name a field"),
        ("{input} {output}", "never {output}"),
    ],
)
def test_malformed_templates(prompt, said):
    with pytest.raises(ConfigError, match=said.replace("{", r"\{").replace("}", r"\}")):
        check_templates(prompt, " {output}")


@pytest.mark.parametrize("answer", ["", "{input}", "{output}{output}", "{virtual:3}{output}"])
def test_malformed_answers(answer):
    with pytest.raises(ConfigError, match="must hold {output} once"):
        check_templates("{input}", answer)


def test_fields_must_be_there_and_be_text():
    with pytest.raises(DataError, match=r"f.jsonl, line 1: field 'contxt' .* did you mean 'context'"):
        pieces("{contxt}")
    with pytest.raises(DataError, match="field 'tags' must be text"):
        pieces("{tags}")


ALPACA = {"instruction": "Translate to French.", "input": "cat", "output": "chat"}


@pytest.mark.fault(
    "Alpaca rows (instruction, input, output) train without their instruction",
    "a template that does not name {instruction} gets it in {input}, above the row's own",
)
def test_an_instruction_is_never_lost():
    row = Alpaca.model_validate(ALPACA)
    assert (
        pieces("{input}", row=row) == pieces("{instruction}\n{input}", row=row) == [Piece("Translate to French.\ncat")]
    )
    assert pieces("Q: {input}\nA:", row=row) == [Piece("Q: Translate to French.\ncat\nA:")]
    assert pieces("[{input}] {instruction}", row=row) == [Piece("[cat] Translate to French.")]
    for empty in ({"instruction": "Translate to French."}, {"instruction": "Translate to French.", "input": None}):
        assert pieces("{input}", row=Alpaca.model_validate(empty)) == [Piece("Translate to French.")]
    assert pieces("{input}", row=Alpaca.model_validate({**ALPACA, "instruction": ""})) == [Piece("cat")]
    template = PromptTemplate("{input}", " {output}", PromptLayout())
    assert template.unread(row) == set()
    assert PromptTemplate("{instruction}", " {output}", PromptLayout()).unread(row) == {"input"}


def test_fields_that_nothing_reads():
    template = PromptTemplate("{context}: {input}", " {output}", PromptLayout())
    row = {"input": "a", "output": "b", "context": "c", "task": "t", "score": 0, "note": "", "other": None, "tags": []}
    assert template.unread(Prompt.model_validate(row)) == {"score"}
    turns = [{"role": "user", "content": "a", "name": "x"}]
    assert template.unread(Chat.model_validate({"messages": turns, "topic": [1], "tools": [], "input": ""})) == {
        "topic"
    }
    assert PromptTemplate("{context}", "{output}", PromptLayout()).unread(Prompt.model_validate(row)) == {
        "score",
        "input",
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "half \ud800 pair", None, b"bytes"])
def test_what_is_no_text_never_stands_in_a_prompt(value):
    with pytest.raises(DataError, match="field 'context' must be text"):
        pieces("{context}", row=Prompt.model_construct(input="a", context=value, task=None))


TASKS = layout(("p", 2, "squad"), ("p", 3, "mood"))
PER_TASK = {"squad": "{virtual:p}{context}?", "mood": "{input}{virtual:3}"}


def row_of(task: str | None, **fields: str) -> Prompt:
    return Prompt.model_validate({"input": "x", "context": "c", "task": task, **fields})


def test_each_task_has_its_own_templates_and_virtual_tokens():
    templates = TaskTemplates(PER_TASK, {"squad": "{output}!", "mood": " {output}"}, TASKS)
    squad, mood = templates.of("squad", HERE), templates.of("mood", HERE)
    assert squad.prompt_pieces(row_of("squad"), HERE) == [Piece(ids=ids(0, 2)), Piece("c?")]
    assert mood.prompt_pieces(row_of("mood"), HERE) == [Piece("x"), Piece(ids=ids(2, 5))]
    assert [squad.answer_text("a"), mood.answer_text("a")] == ["a!", " a"]
    assert templates.unread(row_of("squad"), HERE) == {"input"}
    assert templates.unread(row_of("mood", more="1"), HERE) == {"context", "more"}


def test_one_answer_template_serves_all_tasks_and_one_prompt_template_too():
    one_answer = TaskTemplates(PER_TASK, " {output}", TASKS)
    assert {one_answer.of(task, HERE).answer_text("a") for task in PER_TASK} == {" a"}
    one_prompt = TaskTemplates("{virtual:p}{input}", {"squad": "{output}", "mood": "{output}."}, TASKS)
    assert [one_prompt.of(task, HERE).answer_text("a") for task in PER_TASK] == ["a", "a."]
    assert TaskTemplates("{input}", " {output}", TASKS).of("nobody's", HERE).answer_text("a") == " a"


@pytest.mark.parametrize("task", [None, "mod"])
def test_a_row_whose_task_has_no_template_is_told_the_tasks(task):
    said = "names no 'task'" if task is None else "has the unknown task 'mod'"
    near = "mood" if task else ""
    with pytest.raises(DataError, match=rf"line 1: the row {said}, but its template is chosen by task; .*{near}"):
        TaskTemplates(PER_TASK, " {output}", TASKS).of(task, HERE)


@pytest.mark.parametrize(
    ("prompt", "answer", "said"),
    [
        ({}, "{output}", "prompt_template names no task"),
        ("{input}", {}, "answer_template names no task"),
        ({"a": "{input}", "b": "no field"}, "{output}", "prompt_template 'no field' must name a field"),
        ({"a": "{input}"}, {"a": "gone"}, "answer_template 'gone' must hold"),
        ({"a": "{input}", "b": "{input}"}, {"a": "{output}"}, "only one of them names 'b'"),
    ],
)
def test_templates_by_task_are_checked_one_by_one(prompt, answer, said):
    with pytest.raises(ConfigError, match=said):
        check_templates(prompt, answer)
