"""Evaluation, answers and the command line's verbs for a T5 checkpoint: figures equal transformers' own."""

import json

import pytest
import torch

from graftwork.data import SFTDataModule
from graftwork.data.sequence import Sequence
from graftwork.errors import DataError
from graftwork.inference import Examples, compare, evaluate, evaluate_model, generate
from graftwork.inference.labels import questions, score_answers
from graftwork.inference.scoring import score
from graftwork.models import load
from graftwork.peft import PTuning
from tests.contracts.methods import shake
from tests.helpers.t5_tokenizer import t5_tokenizer
from tests.helpers.tiny_t5 import make_t5, oracle
from tests.inference.conftest import LABELS, TEMPLATE, TEXTS

MORE = [*LABELS, "great", "awful film"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf")
    words = t5_tokenizer(directory)
    return make_t5("t5v11", directory, vocab_size=len(words))


@pytest.fixture
def model(checkpoint):
    return load(checkpoint, dtype="fp32")


@pytest.fixture(scope="module")
def theirs(checkpoint):
    """(summed loss of the label and its end, their number, whether greedy decoding says it) by text and label."""
    model, words = oracle(checkpoint), load(checkpoint).tokenizer

    def scored(text, label):
        source = torch.tensor([words(TEMPLATE.format(input=text)).input_ids])
        target = torch.tensor([words(text_target=label).input_ids])
        with torch.no_grad():
            logits = model(input_ids=source, labels=target).logits[0].double()  # shifts and starts by itself
        losses = torch.nn.functional.cross_entropy(logits, target[0], reduction="none")
        return float(losses.sum()), target.shape[1], bool((logits.argmax(-1) == target[0]).all())

    return {(text, label): scored(text, label) for text in TEXTS for label in MORE}


@pytest.mark.parametrize("labels", [LABELS, MORE], ids=["whole rows", "shared prompts"])
def test_figures_equal_transformers(model, theirs, file, labels):
    right = [theirs[text, LABELS[i % 3]] for i, text in enumerate(TEXTS)]
    predicted = [min(labels, key=lambda label, text=text: theirs[text, label][0]) for text in TEXTS]
    for budget in (2048, 40):
        ours = evaluate_model(model, file, labels=labels, prompt_template=TEMPLATE, batch_tokens=budget)
        assert ours["answer_tokens"] == sum(n for _, n, _ in right)
        assert ours["loss"] == pytest.approx(sum(x for x, _, _ in right) / ours["answer_tokens"], rel=1e-5)
        assert ours["exact_match"] == sum(hit for _, _, hit in right) / len(TEXTS)
        for k, label in enumerate(LABELS):
            said = [p for i, p in enumerate(predicted) if i % 3 == k]
            assert ours["confusion"][label] == {other: said.count(other) for other in labels}
    assert "accuracy" in compare(ours, ours)


def test_likelihoods_equal_transformers_and_each_other(model, theirs, file):
    rows = Examples.from_file(str(file), TEMPLATE).candidates(model, MORE)
    expected = [-theirs[text, label][0] for text in TEXTS for label in MORE]
    whole = [s.likelihood for s in score(model, [s for row in rows for s in row], batch_tokens=90)]
    shared = [s.likelihood for row in score_answers(model, questions(rows), 60) for s in row]
    assert whole == pytest.approx(expected, rel=1e-5) and shared == pytest.approx(expected, rel=1e-5)


def test_exact_match_is_what_greedy_decoding_says(model):
    words = model.tokenizer
    prompts = [words(TEMPLATE.format(input=text)).input_ids for text in TEXTS]
    said = model.generate(prompts, 5, stop_ids=[])
    sequences = [Sequence(p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompts, said)]
    assert all(s.exact for s in score(model, sequences))
    wrong = [Sequence(p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompts, ([*a[:-1], 7] for a in said))]
    assert sum(s.exact for s in score(model, wrong)) < len(wrong)


def test_an_adapter_is_asked_as_it_was_trained(checkpoint, model, file, tmp_path):
    """Virtual tokens in the middle of the source, the template with the artifact: the verbs repeat it by themselves."""
    model.add_adapter(PTuning(virtual_tokens=4, placement="template"))
    shake(model)
    template = "Review: {input}{virtual:4}\nSentiment:"
    model.stack.remember_prompt_format(SFTDataModule(prompt_template=template).prompt_format)
    model.save_adapters(tmp_path / "adapter")
    found = evaluate(str(checkpoint), str(file), adapter=str(tmp_path / "adapter"), baseline=True, dtype="fp32")
    here = evaluate_model(model, file)
    assert found["loss"] == pytest.approx(here["loss"], rel=1e-6) != pytest.approx(found["baseline"]["loss"], rel=1e-3)
    answers = generate(str(checkpoint), list(TEXTS), adapter=str(tmp_path / "adapter"), max_new_tokens=5, dtype="fp32")
    words, virtual = model.tokenizer, model.prompt_layout.ids("ptuning")
    asked = Examples.from_prompts(list(TEXTS))
    encoded = asked.encoder(model).ask(asked.rows)
    assert all(prompt[-1] == 1 and virtual[0] in prompt[1:-1] for prompt, _, _ in encoded)
    said = model.generate([prompt for prompt, _, _ in encoded], 5)
    assert [a["output"] for a in answers] == [t.strip() for t in words.batch_decode(said, skip_special_tokens=True)]


def test_conversations_are_refused(checkpoint, tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    told = "chat.jsonl, line 1: the row holds 'messages', but a sequence-to-sequence model"
    for verb in (evaluate, lambda base, data: generate(base, file=data)):
        with pytest.raises(DataError, match=told):
            verb(str(checkpoint), str(chat))
