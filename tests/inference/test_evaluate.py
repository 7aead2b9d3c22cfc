"""Figures equal those that transformers' logits give, row by row, without batching or padding."""

import inspect
import json
import math
from typing import Optional

import pytest
import torch

from graftwork import parallel
from graftwork.data import SFTDataModule
from graftwork.data.sequence import Sequence
from graftwork.errors import ArtifactError, CheckpointError, ConfigError, DataError
from graftwork.inference import Examples, evaluate, evaluate_model
from graftwork.inference.labels import questions, score_answers
from graftwork.inference.metrics import label_metrics, paired
from graftwork.inference.scoring import _batches, score
from graftwork.models import load
from graftwork.peft import IA3, LoRA, PTuning
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.tiny_hf import oracle
from tests.inference.conftest import LABELS, TEMPLATE, TEXTS


class Oracle:
    """Scores of transformers' model of the same checkpoint, one sequence at a time."""

    def __init__(self, directory, tokenizer):
        self.model, self.tokenizer = oracle(directory), tokenizer

    def score(self, text, label):
        """(summed loss of the answer and its end token, their number, whether greedy decoding says exactly that)."""
        prompt = self.tokenizer(TEMPLATE.format(input=text))["input_ids"]
        answer = [*self.tokenizer(" " + label)["input_ids"], self.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        losses = -torch.log_softmax(logits, -1)[range(len(answer)), answer]
        return float(losses.sum()), len(answer), logits.argmax(-1).tolist() == answer


def sharpen(model) -> None:
    """Train a few steps so that some greedy answers are right: a random model is never exact."""
    tokenizer = model.tokenizer
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        for text, label in [(TEXTS[0], LABELS[0]), (TEXTS[1], LABELS[1]), (TEXTS[3], LABELS[0])]:
            prompt = tokenizer(TEMPLATE.format(input=text))["input_ids"]
            ids = torch.tensor([[*prompt, *tokenizer(" " + label)["input_ids"], tokenizer.eos_token_id]])
            start = len(prompt)
            loss = torch.nn.functional.cross_entropy(model(ids)[0, start - 1 : -1], ids[0, start:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_loss_and_closed_set_equal_transformers(checkpoint, model, file):
    theirs = Oracle(checkpoint, model.tokenizer)
    table = [[theirs.score(text, label) for label in LABELS] for text in TEXTS]
    right = [row[i % 3] for i, row in enumerate(table)]
    predicted = [min(range(3), key=lambda k, row=row: row[k][0]) for row in table]
    for budget in (2048, 40):  # one batch, and many
        ours = evaluate_model(model, file, prompt_template=TEMPLATE, batch_tokens=budget)
        assert ours["rows"] == len(TEXTS) and ours["dropped"] == 0
        assert ours["answer_tokens"] == sum(n for _, n, _ in right)
        assert ours["loss"] == pytest.approx(sum(x for x, _, _ in right) / ours["answer_tokens"], rel=1e-5)
        assert ours["exact_match"] == sum(hit for _, _, hit in right) / len(TEXTS)
        assert ours["accuracy"] == sum(p == i % 3 for i, p in enumerate(predicted)) / len(TEXTS)
        for e, label in enumerate(LABELS):
            rows = [p for i, p in enumerate(predicted) if i % 3 == e]
            assert ours["labels"][label]["rows"] == len(rows)
            assert ours["confusion"][label] == {other: rows.count(k) for k, other in enumerate(LABELS)}
    json.dumps(ours)


def test_many_labels_equal_transformers(checkpoint, model, file):
    theirs, labels = Oracle(checkpoint, model.tokenizer), [*LABELS, "great", "awful film"]
    predicted = [min(labels, key=lambda label, text=text: theirs.score(text, label)[0]) for text in TEXTS]
    ours = evaluate_model(model, file, labels=labels, prompt_template=TEMPLATE)
    for expected, label in enumerate(LABELS):
        rows = [said for i, said in enumerate(predicted) if i % 3 == expected]
        assert ours["confusion"][label] == {other: rows.count(other) for other in labels}
    assert ours["labels"]["great"]["rows"] == 0
    few = evaluate_model(model, file, prompt_template=TEMPLATE)
    assert ours["loss"] == pytest.approx(few["loss"], rel=1e-5) and ours["exact_match"] == few["exact_match"]


def test_likelihoods_equal_transformers(checkpoint, model):
    theirs = Oracle(checkpoint, model.tokenizer)
    sequences = []
    for text in TEXTS:
        for label in LABELS:
            prompt = model.tokenizer(TEMPLATE.format(input=text))["input_ids"]
            answer = [*model.tokenizer(" " + label)["input_ids"], model.tokenizer.eos_token_id]
            sequences.append(Sequence(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    ours = score(model, sequences, batch_tokens=100)
    expected = [theirs.score(text, label) for text in TEXTS for label in LABELS]
    assert [s.likelihood for s in ours] == pytest.approx([-loss for loss, _, _ in expected], rel=1e-5)
    assert len({round(s.likelihood, 3) for s in ours}) > 20


def test_answers_read_from_one_prompt_score_as_whole_sequences(model, file):
    sharpen(model)
    model.add_adapter(PTuning(virtual_tokens=4, embedding_dim=8, bottleneck_dim=8))
    rows = Examples.from_file(str(file), TEMPLATE).candidates(model, LABELS)
    whole = score(model, [sequence for row in rows for sequence in row])
    for budget in (2048, 60):
        shared = [value for row in score_answers(model, questions(rows), budget) for value in row]
        for one, other in zip(shared, whole, strict=True):
            assert (one.tokens, one.exact) == (other.tokens, other.exact)
            assert one.likelihood == pytest.approx(other.likelihood, rel=1e-5)
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
    rows[1][0] = Sequence([5, *rows[1][0].tokens[1:]], rows[1][0].loss)
    assert questions(rows) is None, "another prompt"


def test_exact_match_by_teacher_forcing_is_what_generate_says(model):
    prompts = [model.tokenizer(TEMPLATE.format(input=text))["input_ids"] for text in TEXTS]
    sequences, said = [], model.generate(prompts, max_new_tokens=6, stop_ids=[])
    for number, (prompt, answer) in enumerate(zip(prompts, said)):
        if number % 2:  # one token of the answer is another one
            answer = [*answer]
            answer[number % 6] = (answer[number % 6] + 1) % 300
        sequences.append(Sequence(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    assert [s.exact for s in score(model, sequences)] == [number % 2 == 0 for number in range(len(TEXTS))]


def test_exact_match_of_texts_is_what_generate_says(model, file):
    sharpen(model)
    prompts = [model.tokenizer(TEMPLATE.format(input=text))["input_ids"] for text in TEXTS]
    answers = model.generate(prompts, max_new_tokens=12)
    wanted = [
        [*model.tokenizer(" " + LABELS[i % 3])["input_ids"], model.tokenizer.eos_token_id] for i in range(len(TEXTS))
    ]
    hits = sum(answer == right for answer, right in zip(answers, wanted))
    assert 0 < hits < len(TEXTS)
    assert evaluate_model(model, file, prompt_template=TEMPLATE)["exact_match"] == hits / len(TEXTS)


def test_only_the_last_turn_counts_for_exact_match_and_all_turns_for_the_loss(model):
    learned = [False, False, True, True, False, False, True, True]
    prompt = [20, 30, 40, 50, 60, 70]
    last = model.generate([prompt], max_new_tokens=2, stop_ids=[])[0]
    [found] = score(model, [Sequence(prompt + last, learned)])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + last]))[0].log_softmax(-1).double()
    losses = [-float(logits[t - 1, (prompt + last)[t]]) for t in (2, 3, 6, 7)]
    assert found.exact and found.tokens == 4
    assert found.loss == pytest.approx(sum(losses), rel=1e-5)
    assert found.likelihood == pytest.approx(-sum(losses[2:]), rel=1e-5)


def test_adapters_on_and_off(checkpoint, model, file):
    base = evaluate_model(model, file, prompt_template=TEMPLATE)
    model.add_adapter([PTuning(virtual_tokens=4, embedding_dim=8, bottleneck_dim=8), IA3()])
    on = evaluate_model(model, file, prompt_template=TEMPLATE)
    with model.adapters_disabled():
        off = evaluate_model(model, file, prompt_template=TEMPLATE)
    assert off == base and on["loss"] != base["loss"] and on["answer_tokens"] == base["answer_tokens"]
    assert list(paired(base, on)) == ["loss", "exact_match", "accuracy"]
    assert paired(base, on)["loss"] == {"before": base["loss"], "after": on["loss"]}


def test_a_data_module_gives_what_its_file_gives(model, file, tmp_path):
    data = SFTDataModule(test=str(file), seq_length=128, prompt_template=TEMPLATE, cache_dir=str(tmp_path))
    assert evaluate_model(model, data) == evaluate_model(model, file, prompt_template=TEMPLATE)
    assert evaluate_model(model, data, limit=4)["rows"] == 4
    share = SFTDataModule(train=str(file), validation_fraction=0.5, seq_length=128, prompt_template=TEMPLATE)
    rows = evaluate_model(model, share, labels=LABELS)["rows"]
    assert 0 < rows < len(TEXTS) and rows == len(share.raw_rows("validation"))
    with pytest.raises(DataError, match="no 'validation' file"):
        evaluate_model(model, SFTDataModule(train=str(file)))


def test_rows_that_do_not_fit_are_dropped_or_named(model, file):
    shortest = SFTDataModule(test=str(file), seq_length=12, prompt_template="{input} is", too_long="drop")
    encoded = shortest.encoder_for(model.tokenizer, model.prompt_layout)
    assert evaluate_model(model, shortest, labels=LABELS)["dropped"] == 0, "prompts are cut on the left"
    assert encoded.seq_length == 12
    tight = SFTDataModule(test=str(file), seq_length=4, prompt_template="{input} is", too_long="drop")
    with pytest.raises(DataError, match=r"all 10 rows were dropped as longer than seq_length"):
        evaluate_model(model, tight)


def test_open_answers_have_no_labels(model, tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps({"input": t, "output": t[::-1]}) + "\n" for t in TEXTS))
    figures = evaluate_model(model, path)
    assert set(figures) == {"rows", "answer_tokens", "loss", "exact_match", "dropped"}


def test_label_metrics_by_hand():
    likelihoods = [[-1.0, -2.0, -9.0], [-3.0, -1.0, -9.0], [-1.0, -2.0, -9.0], [-5.0, -4.0, -9.0]]
    figures = label_metrics(["a", "b", "c"], [0, 0, 1, 1], likelihoods)
    assert figures["accuracy"] == 0.5
    assert figures["labels"]["a"] == {"rows": 2, "recall": 0.5, "precision": 0.5}
    assert figures["labels"]["c"] == {"rows": 0, "recall": None, "precision": None}
    assert figures["confusion"]["b"] == {"a": 1, "b": 1, "c": 0}


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [7, 3, 90, 12, 12, 40, 1, 33]
    found = list(_batches(lengths, 60))
    assert sorted(n for batch in found for n in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[n] for n in batch) <= 60 for batch in found)
    assert len(found) < len(lengths)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"data": "nowhere/rows.jsonl"}, DataError, r"data file 'nowhere/rows.jsonl' does not exist"),
        ({"base": "smollm2_135n"}, CheckpointError, r"smollm2_135m"),
        ({"adapter": "nowhere/adapter"}, ArtifactError, r"nowhere/adapter"),
        (
            {"labels": ["negative", "positive"]},
            DataError,
            r"line 3: the answer 'so so' is none of the labels; valid: 'n",
        ),
        ({"labels": ["positive"]}, ConfigError, r"at least two different ones"),
        ({"labels": ["a", "b", "a"]}, ConfigError, r"each once"),
        ({"limit": 0}, ConfigError, r"limit is 0"),
        ({"prompt_template": "{inptu}"}, DataError, r"line 1: field 'inptu' of the prompt template is missing"),
        ({"prompt_template": "fixed"}, ConfigError, r"must name a field"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_sentence(checkpoint, file, change, error, message):
    arguments = {"base": str(checkpoint), "data": str(file), "prompt_template": TEMPLATE, **change}
    with pytest.raises(error, match=message) as raised:
        evaluate(**arguments)
    assert "\n" not in str(raised.value)


def test_the_verb_adds_a_baseline_and_writes_a_file(checkpoint, model, file, tmp_path):
    model.add_adapter(PTuning(virtual_tokens=4, embedding_dim=8, bottleneck_dim=8))
    model.save_adapters(tmp_path / "adapter")
    out = tmp_path / "figures" / "held_out.json"
    figures = evaluate(
        str(checkpoint), str(file), adapter=str(tmp_path / "adapter"), prompt_template=TEMPLATE, dtype="fp32",
        baseline=True, output=str(out),
    )  # fmt: skip
    assert json.loads(out.read_text()) == figures
    assert figures["baseline"] == evaluate(str(checkpoint), str(file), prompt_template=TEMPLATE, dtype="fp32")
    assert (
        figures["loss"] == evaluate_model(model, file, prompt_template=TEMPLATE)["loss"] != figures["baseline"]["loss"]
    )


def test_an_adapter_of_another_base_is_refused(checkpoint, model, file, tmp_path):
    from tests.helpers.tiny_hf import make_tiny
    from tests.helpers.tiny_tokenizer import tiny_tokenizer

    other = make_tiny("llama", tmp_path / "other", seed=1, vocab_size=300)
    tiny_tokenizer(other, 300)
    stranger = load(other, dtype="fp32")
    stranger.add_adapter(LoRA(dim=2))
    stranger.save_adapters(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="base"):
        evaluate(str(checkpoint), str(file), adapter=str(tmp_path / "adapter"), prompt_template=TEMPLATE)


def test_verbs_take_plain_arguments_only():
    from graftwork.inference import generate

    plain = (str, int, float, bool, list[str])
    for verb in (evaluate, generate):
        for parameter in inspect.signature(verb).parameters.values():
            assert parameter.annotation in (*plain, *(Optional[kind] for kind in plain))
            assert not parameter.name.startswith(("run", "executor", "plugins"))


def _evaluated(rank: int, world: int, directory: str, file: str, sizes: dict[str, int]):
    parallel.initialize(layout_of(**sizes))
    model = load(directory, dtype="fp32")
    model.add_adapter(PTuning(virtual_tokens=4, embedding_dim=8, bottleneck_dim=8))
    figures = evaluate_model(model, file, prompt_template=TEMPLATE, batch_tokens=60)
    parallel.destroy()
    return figures


@pytest.mark.processes
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {}, {"pipeline": 2}], ids=["tp2", "dp2", "pp2"])
def test_layouts_give_one_processs_figures_on_every_rank(checkpoint, file, sizes):
    alone = _evaluated(0, 1, str(checkpoint), str(file), {})
    for figures in run_ranks(_evaluated, 2, str(checkpoint), str(file), sizes):
        assert math.isclose(figures.pop("loss"), alone["loss"], rel_tol=1e-5)
        assert figures == {name: value for name, value in alone.items() if name != "loss"}
