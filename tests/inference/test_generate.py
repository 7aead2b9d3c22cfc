"""The generate verb: prompts or a file in, answers out, and the errors in between."""

import json

import pytest

from graftwork.errors import ArtifactError, ConfigError, DataError, GraftworkError
from graftwork.inference import Examples, answer, generate, sample_answers
from graftwork.peft import PTuning
from tests.inference.conftest import LABELS, TEMPLATE, TEXTS


def test_prompts_give_what_the_model_generates(checkpoint, model):
    said = generate(str(checkpoint), ["dull", "a warm film"], prompt_template=TEMPLATE, max_new_tokens=6, dtype="fp32")
    asked = [model.tokenizer(TEMPLATE.format(input=text))["input_ids"] for text in ("dull", "a warm film")]
    texts = model.tokenizer.batch_decode(model.generate(asked, 6), skip_special_tokens=True)
    assert said == [{"input": "dull", "output": texts[0].strip()}, {"input": "a warm film", "output": texts[1].strip()}]


def test_a_file_with_an_adapter_is_answered_and_written(checkpoint, model, file, tmp_path):
    model.add_adapter(PTuning(virtual_tokens=4, embedding_dim=8, bottleneck_dim=8))
    model.save_adapters(tmp_path / "adapter")
    out = tmp_path / "answers.jsonl"
    said = generate(
        str(checkpoint), file=str(file), adapter=str(tmp_path / "adapter"), prompt_template=TEMPLATE, max_new_tokens=6,
        dtype="fp32", output=str(out),
    )  # fmt: skip
    assert [row["input"] for row in said] == list(TEXTS)
    assert [row["expected"] for row in said] == [LABELS[i % 3] for i in range(len(TEXTS))]
    assert [json.loads(line) for line in out.read_text().splitlines()] == said
    examples = Examples.from_file(str(file), TEMPLATE, limit=3)
    assert sample_answers(model, examples, count=2, max_new_tokens=6) == said[:2]
    with model.adapters_disabled():
        assert answer(model, examples, max_new_tokens=6) != said[:3]
    assert answer(model, examples, max_new_tokens=6) == said[:3]


def test_conversations_are_answered(checkpoint, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "who are you?"}]}) + "\n")
    [said] = generate(str(checkpoint), file=str(path), max_new_tokens=3, dtype="fp32")
    assert said["input"] == "who are you?" and "expected" not in said


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"prompts": None}, ConfigError, "either prompts or a file"),
        ({"file": "rows.jsonl"}, ConfigError, "either prompts or a file"),
        ({"prompts": []}, DataError, "there are no prompts"),
        ({"prompts": None, "file": "rows.jsonl"}, DataError, "'rows.jsonl' does not exist"),
        ({"adapter": "missing"}, ArtifactError, "missing"),
        ({"max_new_tokens": 1000}, ConfigError, "context is 128 tokens"),
        ({"prompt_template": "{text}"}, DataError, "prompts, number 1: field 'text' of the prompt template is missing"),
        ({"top_p": 2.0}, ConfigError, "top_p is 2.0"),
    ],
)
def test_what_cannot_be_generated_is_one_clear_sentence(checkpoint, change, error, message):
    with pytest.raises(error, match=message) as raised:
        generate(**{"base": str(checkpoint), "prompts": ["dull"], **change})
    assert "\n" not in str(raised.value)


def test_an_output_that_cannot_be_written_is_one_clear_sentence(checkpoint, tmp_path):
    (tmp_path / "taken").write_text("a file, not a directory")
    with pytest.raises(GraftworkError, match="taken") as raised:
        generate(str(checkpoint), ["dull"], max_new_tokens=1, output=str(tmp_path / "taken" / "answers.jsonl"))
    assert "\n" not in str(raised.value)
