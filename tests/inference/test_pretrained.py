"""The embedded pretrained model answers as it should, with and without a cache."""

import json

import pytest

from graftwork.inference import Examples, answer, evaluate_model
from graftwork.models import load

QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Italy?": "The capital of Italy is Rome.",
}


@pytest.mark.slow
def test_smollm2_answers_questions_and_is_scored_for_them(tmp_path):
    model = load("smollm2_135m", dtype="fp32")
    path = tmp_path / "questions.jsonl"
    chats = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": right}]}
        for asked, right in QUESTIONS.items()
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    examples = Examples.from_file(str(path))
    said = answer(model, examples, max_new_tokens=16)
    assert said == answer(model, examples, max_new_tokens=16, use_cache=False)
    assert "Paris" in said[0]["output"] and said[0]["output"].endswith("."), "it stops by itself"
    hits = [row["output"] == row["expected"] for row in said]
    figures = evaluate_model(model, examples)
    assert any(hits) and figures["exact_match"] == sum(hits) / len(hits)
    assert 0 < figures["loss"] < 1
