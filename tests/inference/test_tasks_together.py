"""Rows of several tasks in one file: evaluation and generation equal what each task gives alone."""

import json

import pytest

from graftwork.data import SFTDataModule
from graftwork.errors import ConfigError, DataError
from graftwork.inference import Examples, answer, compare, evaluate, evaluate_model, generate
from graftwork.inference.metrics import paired
from graftwork.peft import LoRA, PromptTuning, PTuning
from tests.contracts.methods import shake
from tests.inference.conftest import TEXTS

TEMPLATES = {"prompt_template": {"mood": "Review: {input}\nSentiment:", "end": "{input} ends with"}}
ANSWERS = {"mood": ["negative", "positive"], "end": ["it", "me", "you"]}


def rows_of(task: str | None) -> list[dict[str, str]]:
    """Return rows of one task, or of both in turn; the answers of each task are a closed set."""
    if task is not None:
        return [
            {"input": t, "output": ANSWERS[task][i % len(ANSWERS[task])], "task": task} for i, t in enumerate(TEXTS)
        ]
    both = zip(rows_of("mood"), rows_of("end"))
    return [row for pair in both for row in pair]


@pytest.fixture
def files(tmp_path):
    """Files of each task's rows, and of all rows under None."""
    found = {}
    for task in (None, "mood", "end"):
        found[task] = tmp_path / f"{task}.jsonl"
        found[task].write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)))
    return found


@pytest.fixture
def prompted(model):
    """A model with two prompts per task, one of them of more tokens, none at its initial values."""
    model.configure_model()
    model.add_adapter(PTuning(embedding_dim=8, bottleneck_dim=8, init_std=0.3, tasks={"mood": 3, "end": 5}))
    model.add_adapter(PromptTuning(tasks={"end": 1, "mood": 2}, placement="before_bos"))
    shake(model)
    return model


def close(first, second) -> bool:
    return first.keys() == second.keys() and all(
        first[key] == pytest.approx(second[key], rel=1e-5, abs=1e-6)
        for key in first
        if key not in ("labels", "confusion")
    )


def test_figures_of_each_task_are_those_of_its_rows_alone(prompted, files):
    together = evaluate_model(prompted, str(files[None]), **TEMPLATES)
    alone = {task: evaluate_model(prompted, str(files[task]), **TEMPLATES) for task in ANSWERS}
    assert list(together["tasks"]) == list(ANSWERS)
    for task, figures in alone.items():
        assert close(together["tasks"][task], {k: v for k, v in figures.items() if k != "tasks"})
        assert together["tasks"][task]["confusion"] == figures["confusion"]
        assert set(figures["labels"]) == set(ANSWERS[task])
    counts = {name: sum(f[name] for f in alone.values()) for name in ("rows", "answer_tokens", "dropped")}
    assert {name: together[name] for name in counts} == counts
    weighted = sum(f["loss"] * f["answer_tokens"] for f in alone.values()) / counts["answer_tokens"]
    assert together["loss"] == pytest.approx(weighted, rel=1e-6)
    assert together["accuracy"] == pytest.approx(sum(f["accuracy"] for f in alone.values()) / 2)
    assert set(together["labels"]) == {label for labels in ANSWERS.values() for label in labels}
    said = compare(together, together)
    assert "task 'mood': 10 rows" in said and "task 'end': 10 rows" in said
    both = paired(together, together)
    assert both["tasks"]["mood"]["loss"]["after"] == together["tasks"]["mood"]["loss"]


def test_answers_to_mixed_rows_are_those_of_each_task_alone(prompted, files):
    options = {"max_new_tokens": 5}
    mixed = answer(prompted, Examples.from_file(str(files[None]), **TEMPLATES), **options)
    for place, task in enumerate(ANSWERS):
        assert mixed[place::2] == answer(prompted, Examples.from_file(str(files[task]), **TEMPLATES), **options)
        one = Examples.from_prompts([TEXTS[0]], TEMPLATES["prompt_template"], task)
        assert answer(prompted, one, **options)[0]["output"] == mixed[place]["output"]
    assert mixed[0]["output"] != mixed[1]["output"]


def test_a_row_of_an_unknown_task_is_refused_with_the_known_ones(checkpoint, prompted, files, tmp_path):
    rows = [*rows_of("mood")[:1], {"input": "x", "output": "y", "task": "moot"}, {"input": "x", "output": "y"}]
    path = tmp_path / "odd.jsonl"
    said = r"line 2: the row has the unknown task 'moot', but its prompt is chosen by task; did you mean 'mood'"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=said):
        evaluate_model(prompted, str(path))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::2]))
    with pytest.raises(DataError, match=r"line 2: the row names no 'task', but its prompt is chosen by task; valid: "):
        evaluate_model(prompted, str(path))
    with prompted.adapters_disabled():  # the base has no prompts, so it asks for no tasks either
        assert evaluate_model(prompted, str(path))["rows"] == 2
    prompted.save_adapters(tmp_path / "adapter")
    with pytest.raises(DataError, match="the unknown task 'sql', but its prompt is chosen by task; valid: end, mood"):
        generate(str(checkpoint), ["x"], adapter=str(tmp_path / "adapter"), task="sql", dtype="fp32")


def test_any_adapter_may_have_templates_by_task(model, files):
    model.configure_model()
    model.add_adapter(LoRA(dim=2))
    found = evaluate_model(model, str(files[None]), **TEMPLATES)
    assert found["tasks"].keys() == ANSWERS.keys() and found["rows"] == 20
    with pytest.raises(
        DataError, match="line 2: the row has the unknown task 'end', but its template is chosen by task"
    ):
        evaluate_model(model, str(files[None]), prompt_template={"mood": "{input}"})


def test_figures_do_not_mix_tasks_with_free_answers(prompted, files, tmp_path):
    free = [{"input": text, "output": f"free {i}", "task": "end"} for i, text in enumerate(TEXTS)]
    (tmp_path / "free.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*free, *rows_of("mood")]))
    found = evaluate_model(prompted, str(tmp_path / "free.jsonl"), **TEMPLATES)
    assert "accuracy" in found["tasks"]["mood"] and "accuracy" not in found["tasks"]["end"] and "accuracy" not in found


def test_the_command_evaluates_and_remembers_templates_by_task(checkpoint, prompted, files, tmp_path):
    data = SFTDataModule(test=str(files[None]), answer_template={"mood": " {output}", "end": "{output}"}, **TEMPLATES)
    prompted.stack.remember_prompt_format(data.prompt_format)
    prompted.save_adapters(tmp_path / "adapter")
    where = {"base": str(checkpoint), "adapter": str(tmp_path / "adapter"), "dtype": "fp32"}
    figures = evaluate(**where, data=str(files[None]), baseline=True, output=str(tmp_path / "metrics.json"))
    assert close(figures["tasks"]["mood"], evaluate_model(prompted, data)["tasks"]["mood"])
    assert json.loads((tmp_path / "metrics.json").read_text())["tasks"].keys() == ANSWERS.keys()
    assert figures["baseline"]["tasks"]["end"]["loss"] != figures["tasks"]["end"]["loss"]
    assert (
        TEMPLATES["prompt_template"]["mood"]
        in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["adapters"][0]["prompt"][
            "prompt_template"
        ]["mood"]
    )


def test_virtual_tokens_longer_than_the_context_are_refused_before_anything_is_built(model):
    context = model.shape.max_position_embeddings
    said = f"PTuning 'ptuning' has {context:,} virtual tokens, .* context holds {context:,} .* at most {context - 1:,}"
    with pytest.raises(ConfigError, match=said):
        model.add_adapter(PTuning(virtual_tokens=context))
    with pytest.raises(ConfigError, match="PTuning 'ptuning', task 'end', has"):
        model.add_adapter([LoRA(dim=2), PTuning(tasks={"mood": 3, "end": context})])
    assert not model.adapters
    model.add_adapter(PTuning(embedding_dim=4, bottleneck_dim=4, tasks={"mood": 3}))
    with pytest.raises(ConfigError, match="'ptuning', task 'end', has"):
        model.add_tasks("ptuning", {"end": context})
