"""Every layout trains as one process does: same losses, gradient norms, validation loss and trained weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from graftwork import parallel
from graftwork.training.optimizer import gradients
from graftwork.training.optimizer.shards import chunks_of
from tests.helpers import tiny_gpt
from tests.helpers.distributed import run_ranks
from tests.helpers.standin import Curve, Rows, StandIn, trainer_for

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
    "cp2": {"context_parallel_size": 2},
}
BREAKS = {"tp2_sp": "partial", "dp2": "dense", "pp2": "tied"}
MODELS: dict[str, dict[str, Any]] = {
    "everything": {"tied": True},
    "linears": {"train": "linear_qkv.weight", "tied": False},
    "first_stage_only": {"train": "word_embeddings", "tied": False},
}


FOUR_LAYERS = {"num_layers": 4, "tied": True}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "expert_tensor_parallel_size": 1,
}
SPECIAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "interleaved": ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, FOUR_LAYERS),
    "ep2": ({"expert_model_parallel_size": 2}, EXPERTS),
    "whole_experts_on_tp2": (LAYOUTS["tp2_sp"], EXPERTS),
    "tp2_sp_ep2": ({**LAYOUTS["tp2_sp"], "expert_model_parallel_size": 2}, EXPERTS),
}


def two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Go through every layout and every break in the same two processes."""
    layouts = {name: every_model(rank, world_size, layout) for name, layout in LAYOUTS.items()}
    broken = {name: train_broken(rank, world_size, LAYOUTS[name], what) for name, what in BREAKS.items()}
    special = {name: train_one(rank, world_size, layout, **model) for name, (layout, model) in SPECIAL.items()}
    return {"layouts": layouts, "broken": broken, "special": special}


def one_rank(rank: int, world_size: int) -> dict[str, Any]:
    """The reference of every comparison: no layout at all."""
    special = {name: train_one(rank, world_size, {}, **model) for name, (_, model) in SPECIAL.items()}
    return {**every_model(rank, world_size, {}), **special}


def every_model(rank: int, world_size: int, layout: dict[str, Any]) -> dict[str, Any]:
    """Train every model of MODELS for three clipped steps; return losses, norms, validation loss and weights."""
    return {name: train_one(rank, world_size, layout, **model) for name, model in MODELS.items()}


def train_one(rank: int, world_size: int, layout: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Train one model."""
    curve, module = Curve(), StandIn(**model)
    trainer = trainer_for(layout, world_size, rank, callbacks=[curve], gradient_clip_val=1.0)
    trainer.fit(module, datamodule=Rows())
    weights = {
        name_in_whole(chunk, n): tiny_gpt.gathered(tiny_gpt.cut(chunk, n, p), p.detach())
        for chunk in chunks_of(module)
        for n, p in chunk.named_parameters()
    }
    return {
        "losses": curve.losses,
        "norms": curve.norms,
        "val": float(trainer.callback_metrics["val_loss"]),
        "weights": {n: w.clone() for n, w in weights.items()},
    }


def name_in_whole(chunk: Any, name: str) -> str:
    """The last pipeline stage's copy of a tied embedding goes by the embedding's name."""
    tied = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
    return "embedding.word_embeddings.weight" if tied else tiny_gpt.global_name(chunk, name)


def train_broken(rank: int, world_size: int, layout: dict[str, Any], what: str) -> list[float]:
    """Return the losses of a training with one gradient sum left out."""
    init = gradients.Gradients.__init__

    def broken(self: Any, *args: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if what == "dense":
                patch.setattr(parallel, "dp_group", lambda **_: parallel.tp_group())  # of one rank here
            init(self, *args)
        setattr(self, what, None if what == "tied" else [] if what == "partial" else self.dense)

    gradients.Gradients.__init__ = broken  # type: ignore[method-assign]
    try:
        return train_one(rank, world_size, layout, **MODELS["everything"])["losses"]
    finally:
        gradients.Gradients.__init__ = init  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return run_ranks(one_rank, 1)[0]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, timeout=300)


def relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / abs(wanted)


@pytest.mark.processes
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_process(layout: str, model: str, reference: dict, ranks: list[dict]) -> None:
    for rank in ranks:
        assert_equal(rank["layouts"][layout][model], reference[model])


@pytest.mark.fault(
    "gradients of experts are not summed over the ranks that share them",
    "the record on a parameter says that it is an expert's; trained weights equal one process",
)
@pytest.mark.processes
@pytest.mark.parametrize("name", SPECIAL)
def test_virtual_stages_and_experts_train_as_one_process(name: str, reference: dict, ranks: list[dict]) -> None:
    for rank in ranks:
        assert_equal(rank["special"][name], reference[name])


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
    assert relative(found["val"], wanted["val"]) < 1e-5
    for name, weight in found["weights"].items():
        assert torch.allclose(weight, wanted["weights"][name], rtol=1e-5, atol=2e-6), name


@pytest.mark.processes
@pytest.mark.parametrize("layout", BREAKS)
def test_a_missing_gradient_sum_is_noticed(layout: str, reference: dict, ranks: list[dict]) -> None:
    wanted = reference["everything"]["losses"]
    assert max(relative(a, b) for a, b in zip(ranks[0]["broken"][layout], wanted)) > 1e-5


def test_training_moves_only_what_trains(reference: dict[str, Any]) -> None:
    everything, linears = reference["everything"]["weights"], reference["linears"]["weights"]
    parallel.ensure_initialized()
    fresh = dict(tiny_gpt.build(tiny_gpt.config(num_layers=2)).named_parameters())
    assert {n for n in linears if not torch.equal(fresh[n], linears[n])} == {n for n in linears if "qkv.weight" in n}
    assert all(not torch.equal(fresh[n], everything[n]) for n in everything)


def test_loss_is_the_mean_over_the_answer_tokens_of_the_global_batch(reference: dict[str, Any]) -> None:
    """Independent oracle: one forward of the whole batch, no schedule, no microbatches."""
    parallel.ensure_initialized()
    module = tiny_gpt.build(tiny_gpt.config(num_layers=2), tied=True)
    data = Rows(micro_batch_size=4)
    found, per_microbatch = reference["everything"]["losses"][0], []
    for batch in (data.batch(1), *replace(data.batch(1), micro_batch_size=1).microbatches()):
        losses = module(batch.tokens, batch.position_ids, None, labels=batch.labels.clamp(min=0)).detach()
        per_microbatch.append(float(losses[batch.labels != -100].mean()))
    assert relative(found, per_microbatch[0]) < 1e-6
    mean_of_means = sum(per_microbatch[1:]) / 4
    assert relative(found, mean_of_means) > 1e-4, "the data must tell a token mean from a mean of means"


@pytest.mark.fault(
    "validation loss is a mean over batches",
    "sums are divided once, by all answer tokens",
)
def test_validation_loss_weighs_batches_by_their_tokens(reference: dict[str, Any]) -> None:
    """The trained weights, both validation batches at once, one mean over all answer tokens."""
    parallel.ensure_initialized()
    module = tiny_gpt.build(tiny_gpt.config(num_layers=2), tied=True)
    module.load_state_dict(reference["everything"]["weights"], strict=False)
    total, tokens = 0.0, 0
    for seed in (101, 102):
        batch = Rows(micro_batch_size=4).batch(seed)
        losses = module(batch.tokens, batch.position_ids, None, labels=batch.labels.clamp(min=0)).detach()
        keep = batch.labels != -100
        total, tokens = total + float(losses[keep].sum()), tokens + int(keep.sum())
    assert relative(reference["everything"]["val"], total / tokens) < 1e-6
