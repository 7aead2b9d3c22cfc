"""Prompt tuning and the LSTM encoder against Hugging Face PEFT: same values, same logits, same gradients."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.p_tuning import PromptEncoder, PromptEncoderConfig
from torch import Tensor

from graftwork import models, parallel
from graftwork.data import RowEncoder
from graftwork.data.schema import Place, Prompt
from graftwork.errors import ConfigError
from graftwork.models import GPT
from graftwork.models.weights import read_config, shape_from_hf
from graftwork.peft import PEFT, PromptTuning, PTuning
from tests.contracts.methods import make, shake
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.tiny_hf import ODD_VOCABULARY, make_tiny, oracle
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TOLERANCE = 1e-5
LENGTH, WORDS = 4, 301


def tokens() -> Tensor:
    return torch.randint(ODD_VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(5))


def loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, -15:-1].flatten(0, 1), tokens()[:, 1:].flatten())


def assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    found, wanted = found.detach(), wanted.detach()
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), what


def prompted(model: GPT) -> Tensor:
    """Return rows with the prompt where HF PEFT puts it: before everything else."""
    return torch.cat([torch.tensor(model.prompt_layout.placed("before_bos")).expand(2, -1), tokens()], dim=1)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "qwen3"])
def test_prompt_tuning(family: str, tmp_path: Path) -> None:
    make_tiny(family, tmp_path / "hf")
    ours = models.load(tmp_path / "hf")
    ours.add_adapter(PromptTuning(virtual_tokens=LENGTH, placement="before_bos"))
    shake(ours, 0.2)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs = peft.get_peft_model(oracle(tmp_path / "hf"), config)
    (adapter,) = ours.stack.adapters()
    table = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(adapter.table)
    found, wanted = ours(prompted(ours)), theirs(tokens()).logits
    assert_close(found, wanted, "logits")
    loss(found).backward()
    loss(wanted).backward()
    assert_close(adapter.table.grad, table.grad, "gradient of the table")


def test_the_data_put_the_prompt_where_hf_peft_does(tmp_path: Path) -> None:
    model = make()
    model.add_adapter(PromptTuning(virtual_tokens=LENGTH, placement="before_bos"))
    encoder = RowEncoder(tiny_tokenizer(tmp_path, 300), model.prompt_layout, add_bos=True)
    row = Prompt.model_validate({"input": "a film", "output": "good"})
    ((asked, *_),) = encoder.ask([(Place("rows", "line", 1), row)])
    assert asked[: LENGTH + 1] == [*model.prompt_layout.ids("prompt_tuning"), encoder.tokenizer.bos_token_id]


def test_the_lstm_encoder() -> None:
    """HF PEFT's module with our weights gives our table, and its gradients ours."""
    model, width, states = make(), 32, 7
    model.add_adapter(PTuning(virtual_tokens=5, embedding_dim=width, bottleneck_dim=states, encoder="lstm"))
    shake(model)
    (adapter,) = model.stack.adapters()
    config = PromptEncoderConfig(
        num_virtual_tokens=5, token_dim=width, num_transformer_submodules=1, encoder_hidden_size=states,
        encoder_reparameterization_type="LSTM", encoder_dropout=0.0,
    )  # fmt: skip
    theirs = PromptEncoder(config)
    names = {
        "slots": "embedding.weight",
        "linear_in": "mlp_head.0.weight",
        "bias_in": "mlp_head.0.bias",
        "linear_out": "mlp_head.2.weight",
        "bias_out": "mlp_head.2.bias",
        **{f"lstm_{name}": f"lstm_head.{name}" for name, _ in theirs.lstm_head.named_parameters()},
    }
    known, mine = dict(theirs.named_parameters()), dict(adapter.named_parameters())
    assert {names[name] for name in mine} == known.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            known[names[name]].copy_(parameter)
    found, wanted = adapter.rows(), theirs(torch.arange(5).unsqueeze(0))[0]
    assert_close(found, wanted, "table")
    found.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in mine.items():
        assert_close(parameter.grad, known[names[name]].grad, f"gradient of {name}")


def start(directory: Path, transform: PEFT) -> tuple[Tensor, Tensor]:
    """Return the table that prompt tuning starts from, and the base's whole embedding."""
    model = GPT(shape_from_hf(read_config(directory)), checkpoint=str(directory), dtype="fp32")
    model.configure_model()
    model.add_adapter(transform)
    (adapter,) = model.stack.adapters()
    return adapter.table.detach().clone(), model.chunks[0].embedding.word_embeddings.weight.detach().clone()


def in_layout(rank: int, world_size: int, directory: Path) -> list[Tensor]:
    """Return this rank's table for every way to start."""
    if world_size > 1:
        parallel.initialize(layout_of(tensor=world_size))
    return [start(directory, PromptTuning(virtual_tokens=7, **options))[0] for options in INITS.values()]


INITS: dict[str, dict[str, Any]] = {
    "vocab": {},
    "text": {"init": "text", "init_text": "good film"},
    "random": {"init": "random", "init_std": 0.5},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose vocabulary, which is padded at TP2, is that of its tokenizer."""
    directory = make_tiny("llama", tmp_path_factory.mktemp("prompts"), vocab_size=WORDS)
    tiny_tokenizer(directory, WORDS, adds_bos=True)
    return directory


def test_where_a_table_starts(checkpoint: Path) -> None:
    table, words = start(checkpoint, PromptTuning(virtual_tokens=7))
    assert all(any(torch.equal(row, word) for word in words[:WORDS]) for row in table)
    assert len({tuple(row.tolist()) for row in table}) > 4

    model = models.load(checkpoint, dtype="fp32")
    ids = model.tokenizer("good film", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    for length in (len(ids) - 1, len(ids), 2 * len(ids) + 1):
        table, words = start(checkpoint, PromptTuning(virtual_tokens=length, init="text", init_text="good film"))
        assert torch.equal(table, words[(ids * 3)[:length]])

    table, words = start(checkpoint, PromptTuning(virtual_tokens=100, init="random", init_std=0.5))
    assert table.std() == pytest.approx(0.5, rel=0.05)


def test_each_task_may_start_from_its_own_text(checkpoint: Path) -> None:
    model, texts = models.load(checkpoint, dtype="fp32"), {"a": "good", "b": "film"}
    model.add_adapter(PromptTuning(init="text", init_text=texts, tasks={"a": 1, "b": 1}))
    with pytest.raises(ConfigError, match="init_text is given for a, b; give one text, or one for each task: a, b, c"):
        model.add_tasks("prompt_tuning", {"c": 1})
        model.configure_model()
    model.add_tasks("prompt_tuning", {"c": 1}, init_text={"c": "good"})
    (adapter,) = model.stack.adapters()
    assert torch.equal(adapter.of("a").table, adapter.of("c").table)
    assert not torch.equal(adapter.of("a").table, adapter.of("b").table)
    assert model.adapters["prompt_tuning"].hyperparameters()["init_text"] == {**texts, "c": "good"}


def test_a_table_starts_alike_in_every_layout(checkpoint: Path) -> None:
    """The embedding is cut over tensor-parallel ranks: each row comes from the rank that has it."""
    wanted = in_layout(0, 1, checkpoint)
    for found in run_ranks(in_layout, 2, checkpoint):
        assert all(map(torch.equal, found, wanted))


def test_a_text_needs_a_tokenizer_but_a_trained_table_does_not(tmp_path: Path) -> None:
    model, tokenizer = make(sizes={"vocab_size": WORDS}), tiny_tokenizer(tmp_path / "tokenizer", WORDS)
    with pytest.raises(ConfigError, match="set model.tokenizer"):
        model.add_adapter(PromptTuning(init="text", init_text="x"))
    assert not model.adapters
    model.tokenizer = tokenizer
    with pytest.raises(ConfigError, match="init_text '' has no token"):
        model.add_adapter(PromptTuning(init="text", init_text=""))
    model.stack.add(PromptTuning(init="text", init_text="x"), loaded=True)
    model.save_adapters(tmp_path / "adapter")
    other = make(sizes={"vocab_size": WORDS})
    other.load_adapters(tmp_path / "adapter")
    assert torch.equal(next(other.stack.adapters()).table, next(model.stack.adapters()).table)
