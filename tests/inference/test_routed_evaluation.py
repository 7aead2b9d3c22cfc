"""Rows of one file that name their adapters: figures and answers equal what those adapters alone give."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graftwork.errors import MatchError
from graftwork.inference import Examples, answer, compare, evaluate_model
from graftwork.inference.metrics import paired
from graftwork.models import GPT
from graftwork.peft import IA3, LoRA, PTuning
from tests.contracts.methods import shake
from tests.inference.conftest import TEXTS

LABELS = ["negative", "positive"]
WAYS = {"mood": "mood", "end+style": ["end", "style"], "base": None}
FORMATS = {"mood": "Review: {input}\nSentiment:", "end": "{input} ends with", "style": "{input} ends with"}
TEMPLATES = {"mood": FORMATS["mood"], "end+style": FORMATS["end"], "base": "{input}"}


def rows(named: object = "none") -> str:
    found = [{"input": text, "output": LABELS[i % 2]} for i, text in enumerate(TEXTS)]
    lines = [row if named == "none" else {**row, "adapter": named} for row in found]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def adapted(model: GPT) -> GPT:
    """A model of three adapters, two of which were trained with other templates than the third."""
    model.configure_model()
    model.add_adapter(LoRA("mood", dim=4))
    model.add_adapter(PTuning("end", virtual_tokens=3, embedding_dim=8, bottleneck_dim=8, init_std=0.3))
    model.add_adapter(IA3("style"))
    shake(model)
    for name, template in FORMATS.items():
        model.stack.prompt_formats[name] = {"prompt_template": template}
    return model


@contextmanager
def alone(model: GPT, named: object) -> Iterator[None]:
    names = {named} if isinstance(named, str) else set(named or ())
    layout = model.stack.layout
    for name in model.adapters:
        for adapter in model.stack.adapters(name):
            adapter.enabled = name in names
    model.stack.layout = layout if "end" in names else type(layout)()
    yield
    model.stack.layout = layout
    for adapter in model.stack.adapters():
        adapter.enabled = True


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(rows(named) for named in WAYS.values()))
    return str(path)


def test_figures_of_each_adapter_are_those_of_a_run_with_it_alone(adapted: GPT, mixed: str, tmp_path: Path) -> None:
    together = evaluate_model(adapted, mixed)
    (tmp_path / "plain.jsonl").write_text(rows())
    for name, named in WAYS.items():
        with alone(adapted, named):
            wanted = evaluate_model(adapted, str(tmp_path / "plain.jsonl"), prompt_template=TEMPLATES[name])
        for key in ("loss", "exact_match", "accuracy", "rows", "answer_tokens"):
            assert together["adapters"][name][key] == pytest.approx(wanted[key], rel=1e-5), (name, key)
        assert together["adapters"][name]["confusion"] == wanted["confusion"]
    assert together["rows"] == 3 * len(TEXTS) and len({f["loss"] for f in together["adapters"].values()}) == 3
    assert "adapter 'end+style': 10 rows" in compare(together, together)
    assert paired(together, together)["adapters"]["mood"]["loss"]["after"] == together["adapters"]["mood"]["loss"]


def test_answers_of_each_adapter_are_those_of_a_run_with_it_alone(adapted: GPT, mixed: str, tmp_path: Path) -> None:
    said = answer(adapted, Examples.from_file(mixed), max_new_tokens=5)
    (tmp_path / "plain.jsonl").write_text(rows())
    for start, (name, named) in zip(range(0, len(said), len(TEXTS)), WAYS.items()):
        with alone(adapted, named):
            asked = Examples.from_file(str(tmp_path / "plain.jsonl"), prompt_template=TEMPLATES[name])
            assert said[start : start + len(TEXTS)] == answer(adapted, asked, max_new_tokens=5), name


def test_rows_that_name_nobody_have_no_table(adapted: GPT, tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_text(rows())
    assert "adapters" not in evaluate_model(adapted, str(tmp_path / "plain.jsonl"), prompt_template="{input}")


def test_an_unknown_adapter_is_refused(adapted: GPT, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(rows("moood"))
    with pytest.raises(MatchError, match="no adapter 'moood'; .*'mood'"):
        evaluate_model(adapted, str(tmp_path / "other.jsonl"), prompt_template="{input}")
