"""What lm-eval says of an exported adapter and of a merged model is what ``graft evaluate`` and ``generate`` say."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftwork.inference import evaluate, generate
from graftwork.models import load
from graftwork.models.merging import merge_directory
from graftwork.models.weights.hub import resolve
from graftwork.peft import LoRA
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_tokenizer import CORPUS, EOS, tiny_tokenizer
from tests.labs.clients.conftest import Run

LABELS = ("k", "q", "v", "x", "z")
"""Of two tokens each, so that a random model prefers none of them for its length."""
PROMPT = "Letter of: {input}"
NEW_TOKENS = 8
TEXTS = [
    " ".join(words[start : start + 2 + start % 5])
    for words in (text.split() for text in CORPUS)
    for start in range(0, len(words) - 3, 3)
]
ROWS = [{"input": text, "output": LABELS[number % len(LABELS)]} for number, text in enumerate(TEXTS)]

CHOICES = f"""
task: choices
output_type: multiple_choice
doc_to_choice: {json.dumps([f"{label}{EOS}" for label in LABELS])}
doc_to_target: '{{{{ {json.dumps(LABELS)}.index(output) }}}}'
metric_list: [{{metric: acc}}]
"""
GREEDY = f"""
task: greedy
output_type: generate_until
doc_to_target: '{{{{output}}}}'
generation_kwargs: {{until: ["{EOS}"], do_sample: false, max_gen_toks: {NEW_TOKENS}}}
metric_list: [{{metric: exact_match}}]
"""
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "Letter of: {{{{input}}}}"
target_delimiter: " "
"""


@pytest.fixture(scope="module", params=("tiny", pytest.param("smollm2_135m", marks=pytest.mark.slow)))
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer, an adapter on it: ours, as Hugging Face PEFT and merged; rows and lm-eval's tasks."""
    root = tmp_path_factory.mktemp("desk")
    if request.param == "tiny":
        tiny_tokenizer(make_tiny("llama", root / "base", vocab_size=300), 300)
    else:
        (root / "base").symlink_to(resolve(request.param))
    model = load(root / "base", dtype="fp32")
    model.add_adapter(LoRA(dim=4))
    shake(model, 0.1 if request.param == "tiny" else 0.02)
    model.save_adapters(root / "adapter")
    model.export_adapters(root / "peft")
    merge_directory(root / "adapter", root / "merged", root / "base")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "tasks").mkdir()
    for name, task in (("choices", CHOICES), ("greedy", GREEDY)):
        (root / "tasks" / f"{name}.yaml").write_text(task + COMMON.format(file=root / "rows.jsonl"))
    return root


def measured(lm_eval: Run, desk: Path, model: str, place: Path) -> tuple[float, dict[str, list[dict[str, Any]]]]:
    """Return lm-eval's accuracy and, per task, what it has logged of each row in their order."""
    lm_eval(
        model_args=f"{model},dtype=float32",
        tasks="choices,greedy",
        include_path=str(desk / "tasks"),
        output_path=str(place),
        batch_size="4",
    )
    (results,) = place.rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["choices"]["acc,none"]
    samples = {}
    for task in ("choices", "greedy"):
        (file,) = place.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(rows, key=lambda row: row["doc_id"])
    return accuracy, samples


def likelihoods(row: dict[str, Any]) -> list[float]:
    """Return the log-likelihood of each label of a row."""
    return [float(value) for value, _ in row["filtered_resps"]]


@pytest.mark.parametrize("form", ("peft", pytest.param("merged", marks=pytest.mark.slow)))
def test_lm_eval_measures_what_we_do(lm_eval: Run, desk: Path, tmp_path: Path, form: str) -> None:
    place = {"peft": f"pretrained={desk / 'base'},peft={desk / 'peft'}", "merged": f"pretrained={desk / 'merged'}"}
    ours = evaluate(
        str(desk / "base"), str(desk / "rows.jsonl"), adapter=str(desk / "adapter"), prompt_template=PROMPT,
        labels=list(LABELS), baseline=True, dtype="fp32",
    )  # fmt: skip
    accuracy, samples = measured(lm_eval, desk, place[form], tmp_path)

    choices = [likelihoods(row) for row in samples["choices"]]
    confusion = {expected: dict.fromkeys(LABELS, 0) for expected in LABELS}
    for values, row in zip(choices, ROWS, strict=True):
        confusion[row["output"]][LABELS[values.index(max(values))]] += 1
    assert confusion == ours["confusion"] != ours["baseline"]["confusion"]
    assert sum(any(row[label] for row in confusion.values()) for label in LABELS) > 1, "answers differ between rows"
    assert accuracy == pytest.approx(ours["accuracy"], abs=1e-9)
    right = -sum(values[LABELS.index(row["output"])] for values, row in zip(choices, ROWS, strict=True))
    assert right / ours["answer_tokens"] == pytest.approx(ours["loss"], rel=1e-5)
    assert abs(ours["baseline"]["loss"] - ours["loss"]) > 1e-2

    said = generate(
        str(desk / "base"), file=str(desk / "rows.jsonl"), adapter=str(desk / "adapter"), prompt_template=PROMPT,
        max_new_tokens=NEW_TOKENS, dtype="fp32",
    )  # fmt: skip
    assert [row["filtered_resps"][0].strip() for row in samples["greedy"]] == [one["output"].strip() for one in said]
