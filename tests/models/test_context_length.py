"""Rows longer than the model's positions are refused before anything is trained, on learned and on rotary positions."""

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from graftwork import models
from graftwork.batch import Batch
from graftwork.errors import ConfigError
from graftwork.models import GPT
from graftwork.peft import LoRA, PTuning
from tests.contracts.methods import base_values, every_family, make, prompted, same, tokens
from tests.helpers.tiny_hf import make_tiny, oracle
from tests.helpers.tiny_run import SHAPE, data_module, trainer, write_data

LIMIT = 16


def step(model: GPT, batch: Batch) -> None:
    """Run one training microbatch."""
    model.forward_step(iter([batch]), model.chunks[0])


@every_family
def test_a_row_one_token_too_long(family: str) -> None:
    model = make(family, {"max_position_embeddings": LIMIT})
    fits, long = tokens(length=LIMIT), tokens(length=LIMIT + 1)
    assert model(fits).isfinite().all()
    step(model, Batch.of(fits, fits))
    for run in (lambda: model(long), lambda: step(model, Batch.of(long, long))):
        with pytest.raises(ConfigError, match=r"a row of 17 tokens.*embeddings=16\); set data.seq_length"):
            run()


def test_a_window_ends_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_tiny("mistral", tmp_path, sliding_window=LIMIT)
    model = models.load(directory, dtype="fp32").eval()
    assert "Rows are limited to the model's sliding window of 16 tokens, within which it has no effect." in caplog.text
    fits, long = tokens(length=LIMIT), tokens(length=2 * LIMIT)
    with torch.no_grad():
        theirs = oracle(directory)(fits).logits
        assert (model(fits) - theirs).abs().max() <= 2e-5 * theirs.abs().max()
        with pytest.raises(ConfigError, match=r"a row of 32 tokens.*max_position_embeddings=16"):
            model(long)
        with pytest.raises(ConfigError, match="Prompt 0 has 16 tokens and asks for 1 more, but the model"):
            model.generate([fits[0].tolist()], max_new_tokens=1)
        model.export_hf(tmp_path / "out")
        # what goes out has the window too
        assert torch.equal(oracle(tmp_path / "out")(long).logits, oracle(directory)(long).logits)


@every_family
def test_virtual_tokens_count(family: str) -> None:
    model = make(family, {"max_position_embeddings": LIMIT})
    model.add_adapter(PTuning(virtual_tokens=4))
    ids = tokens(length=LIMIT - 4)
    assert model(prompted(model, ids)).isfinite().all()
    with pytest.raises(ConfigError, match="a row of 17 tokens, virtual ones included"):
        model(prompted(model, tokens(length=LIMIT - 3)))


@every_family
def test_packed_rows_count_one_by_one(family: str) -> None:
    model = make(family, {"max_position_embeddings": LIMIT})
    ids = tokens(rows=1, length=2 * LIMIT)
    positions = (torch.arange(2 * LIMIT) % LIMIT)[None]
    halves = Batch(ids, ids, positions, cu_seqlens=torch.tensor([[0, LIMIT, 2 * LIMIT]], dtype=torch.int32))
    step(model, halves)
    uneven = replace(halves, cu_seqlens=torch.tensor([[0, LIMIT - 1, 2 * LIMIT]], dtype=torch.int32))
    with pytest.raises(ConfigError, match="a row of 17 tokens"):
        step(model, uneven)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("strategy", ["megatron", "plain"])
def test_data_that_may_give_longer_rows_are_refused(positions: str, strategy: str, tmp_path: Path) -> None:
    model = GPT(replace(SHAPE, position_embedding=positions, max_position_embeddings=LIMIT))
    model.add_adapter(LoRA(dim=4))
    model.configure_model()
    before = base_values(model)
    run = trainer(tmp_path) if strategy == "megatron" else pl.Trainer(accelerator="cpu", max_steps=2, logger=False)
    with pytest.raises(ConfigError, match=r"data.seq_length=48 is longer .* max_position_embeddings=16"):
        run.fit(model, datamodule=data_module(write_data(tmp_path)))
    assert run.global_step == 0 and same(base_values(model), before)
