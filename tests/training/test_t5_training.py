"""finetune of a T5: adapters and all weights learn, come back from their files, and a run that was cut goes on."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from graftwork import models
from graftwork.errors import ConfigError, MatchError, ParallelismError
from graftwork.models import T5
from graftwork.peft import IA3, PEFT, CanonicalAdapter, LoRA, PTuning
from graftwork.training.callbacks import Interrupted, Report
from tests.contracts.methods import shake
from tests.helpers import tiny_run
from tests.helpers.tiny_run import finetune
from tests.helpers.tiny_t5 import ids, masks, shape

SIZES: dict[str, Any] = {"vocab_size": tiny_run.SHAPE.vocab_size, "hidden_dropout": 0.1, "attention_dropout": 0.1}
STACKS: dict[str, Any] = {
    "everything": lambda: None,
    "lora": lambda: [LoRA(dim=4, layers={"encoder": [0, 1], "decoder": [2]})],
    "stack": lambda: [PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8), LoRA(dim=4), IA3()],
}


def fresh(kind: str = "t5v11", **options: Any) -> T5:
    return T5(shape(kind, **SIZES), **options)


def run(data: Path, root: Path, stack: str, stop: int | None = None, **options: Any) -> tuple[T5, pl.Trainer]:
    """Train eight steps, or up to a request to stop."""
    model = fresh(**options)
    trainer = tiny_run.trainer(root, callbacks=[tiny_run.StopAfter(stop)] if stop else [])
    arguments = (model, trainer, tiny_run.data_module(data), STACKS[stack](), tiny_run.optim())
    if stop is None:
        finetune(*arguments)
    else:
        with pytest.raises(Interrupted):
            finetune(*arguments)
    return model, trainer


def report(trainer: pl.Trainer) -> Report:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(c for c in callbacks if isinstance(c, Report))


def logits(model: T5) -> Tensor:
    (source, target), (source_mask, _) = ids(), masks()
    virtual = [i for slot in model.prompt_layout.slots for i in slot.ids]
    prompt = torch.tensor(virtual, dtype=torch.long).expand(len(source), -1)
    source = torch.cat([prompt, source], dim=1)
    source_mask = torch.cat([torch.ones_like(prompt), source_mask], dim=1)
    with torch.no_grad():
        return model.eval()(source, target, source_mask)


@pytest.mark.parametrize("stack", STACKS)
def test_interrupted_and_resumed_equals_uninterrupted(stack: str, tiny_data: Path, tmp_path: Path) -> None:
    model, trainer = run(tiny_data, tmp_path / "whole", stack)
    losses = [loss for _, loss in report(trainer).train]
    assert len(losses) == 8 and losses[-1] < losses[0]
    run(tiny_data, tmp_path / "cut", stack, stop=4)
    again, resumed = run(tiny_data, tmp_path / "cut", stack)
    assert report(resumed).train == report(trainer).train and report(resumed).validation == report(trainer).validation
    wanted = dict(model.named_parameters())
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in again.named_parameters())


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_trains_a_frozen_base_alike(recompute: str, tiny_data: Path, tmp_path: Path) -> None:
    _, plain = run(tiny_data, tmp_path / "plain", "lora")
    _, again = run(tiny_data, tmp_path / "again", "lora", recompute=recompute)
    wanted = [loss for _, loss in report(plain).train]
    assert [loss for _, loss in report(again).train] == pytest.approx(wanted, rel=1e-5)


def test_an_artifact_brings_the_adapters_back(tiny_data: Path, tmp_path: Path) -> None:
    model, _ = run(tiny_data, tmp_path, "stack")
    other = fresh()
    other.load_adapters(tmp_path / "adapter")
    other.configure_model()
    assert torch.equal(logits(other), logits(model))
    with other.adapters_disabled():
        base = fresh()
        base.configure_model()
        assert torch.equal(logits(other), logits(base))


def test_all_weights_are_exported_for_transformers(tiny_data: Path, tmp_path: Path) -> None:
    model, _ = run(tiny_data, tmp_path / "run", "everything")
    model.export_hf(tmp_path / "hf")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    (source, target), (mask, _) = ids(), masks()
    with torch.no_grad():
        wanted = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    assert torch.allclose(logits(model), wanted, atol=5e-5 * float(wanted.abs().max()))
    assert torch.equal(logits(models.load(tmp_path / "hf")), logits(model))


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_lora_merges_and_comes_apart(kind: str) -> None:
    model = fresh(kind, dtype="fp32")
    model.add_adapter(LoRA(dim=4))
    model.configure_model()
    shake(model, 0.02)
    live = logits(model)
    base = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapters()
    assert torch.allclose(logits(model), live, atol=1e-4 * float(live.abs().max()))
    model.unmerge_adapters()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters()) and torch.equal(logits(model), live)


@pytest.mark.parametrize("method", [LoRA(dim=4), IA3(), CanonicalAdapter(dim=4)], ids=str)
def test_methods_reach_both_stacks(method: PEFT) -> None:
    model = fresh(dtype="fp32")
    model.configure_model()
    model.add_adapter(method)
    sites = {tensor.key for tensor in model.stack.tensors(method.name)}
    assert {part for key in sites for part in ("encoder.layers.1", "decoder.layers.2") if part in key} == {
        "encoder.layers.1",
        "decoder.layers.2",
    }


def test_layers_that_a_part_does_not_have_are_refused() -> None:
    model = fresh(dtype="fp32")
    model.configure_model()
    with pytest.raises(MatchError, match="layers has 2, but the model's layers are 0 to 1"):
        model.add_adapter(LoRA(layers={"encoder": [2]}))
    with pytest.raises(MatchError, match="layers names 'decodr'; did you mean 'decoder'"):
        model.add_adapter(LoRA(layers={"decodr": [0]}))


def test_what_cannot_be_divided_or_packed_is_refused_before_anything_is_built(tiny_data: Path, tmp_path: Path) -> None:
    for layout, field in (
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2"),
        ({"context_parallel_size": 2}, "context_parallel_size=2"),
    ):
        trainer = tiny_run.trainer(tmp_path, world_size=2, layout=layout)
        strategy: Any = trainer.strategy
        model = fresh()
        with pytest.raises(ParallelismError, match=f"{field} cannot divide an encoder-decoder; 1 is valid"):
            strategy.layout.check_shape(model.shape)
        assert model.module is None
    packed = tiny_run.data_module(tiny_data, packing=True, seq_length=64, micro_batch_size=1, global_batch_size=2)
    model = fresh()
    with pytest.raises(ConfigError, match="pack"):
        finetune(model, tiny_run.trainer(tmp_path / "packed"), packed, [LoRA()], tiny_run.optim())
