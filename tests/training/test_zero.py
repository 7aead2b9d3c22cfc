"""A distributed optimizer gives the bits of a whole one, in weights and training states, and a rank its share only."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from megatron.core import dist_checkpointing

from graftwork import parallel
from graftwork.errors import ConfigError
from graftwork.optim import AdamW
from graftwork.parallel import sharded_files
from graftwork.parallel.collective import barrier
from graftwork.training.optimizer import gradients
from graftwork.training.optimizer.bucket import Bucket
from graftwork.training.optimizer.queue import Queue
from graftwork.training.optimizer.shards import chunks_of
from tests.helpers.distributed import run_ranks
from tests.helpers.standin import Curve, Rows, StandIn, trainer_for
from tests.training.test_strategy_layouts import EXPERTS, FOUR_LAYERS, LAYOUTS

BF16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "tied": True}
TWO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp2": ({}, {"tied": True}),
    "cp2": ({"context_parallel_size": 2}, {"tied": True}),
}
FOUR: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp4": ({}, {"tied": True}),
    "dp2_tp2": (LAYOUTS["tp2_sp"], {"tied": True}),
    "dp2_pp2_bf16": (LAYOUTS["pp2"], BF16),
    "dp2_ep2": ({"expert_model_parallel_size": 2}, EXPERTS),
}
SPECIAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp2_vpp2": ({**LAYOUTS["pp2"], "virtual_pipeline_model_parallel_size": 2}, FOUR_LAYERS),
    "dp2_pp2_some": (LAYOUTS["pp2"], {"train": "linear_qkv.weight", "tied": False}),
    "ep4": ({"expert_model_parallel_size": 4}, EXPERTS),
}
SHARES = {"dp2": 2, "cp2": 2, "dp4": 4, "dp2_tp2": 2, "dp2_pp2_bf16": 2}
"""How many ranks share all of the state out: experts have fewer."""


def train(
    rank: int, world: int, layout: dict[str, Any], model: dict[str, Any], shared: bool, state: Path | None = None,
    *more: Callback,
) -> dict[str, Any]:  # fmt: skip
    """Train two clipped steps; return what they gave, and save the training state's tensors."""
    curve, module, early = Curve(), StandIn(optim=AdamW(lr=1e-2, weight_decay=0.1), **model), list[tuple[int, int]]()
    layout = {**layout, "distributed_optimizer": shared}
    trainer = trainer_for(
        layout, world, rank, callbacks=[curve, *more], gradient_clip_val=0.5, limit_val_batches=0, max_steps=2
    )
    finish = Queue.finish

    def noting(self: Queue) -> None:
        early.append((self._next, len(self._buckets)))
        finish(self)

    with patch.object(Queue, "finish", noting):
        trainer.fit(module, datamodule=Rows())
    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
        barrier()
        sharded_files.save(trainer.strategy.update.state(), state)  # type: ignore[union-attr, attr-defined]
    held = [t for one in trainer.optimizers[0].state.values() for kind, t in one.items() if kind != "step"]
    trained = [p for chunk in chunks_of(module) for p in chunk.parameters() if p.requires_grad]
    width = 12 if trained[0].dtype == torch.bfloat16 else 8
    return {
        "curve": (curve.losses, curve.norms),
        "early": early,
        "weights": {f"{i}/{n}": p.detach() for i, c in enumerate(chunks_of(module)) for n, p in c.named_parameters()},
        "bytes": sum(t.numel() * t.element_size() for t in held),
        "whole": sum(p.numel() for p in trained) * width,
    }


def every(rank: int, world: int, cases: dict[str, Any], root: Path) -> dict[str, list[dict[str, Any]]]:
    """Train every case with a whole and with a distributed optimizer, in small buckets."""
    gradients.BUCKET_ELEMENTS = 5000
    return {
        name: [train(rank, world, *case, shared, root / name / str(shared)) for shared in (False, True)]
        for name, case in cases.items()
    }


def two_ranks(rank: int, world: int, root: Path) -> dict[str, Any]:
    """Every case of two ranks, and one whose ranks never hear of each other's steps."""
    found: dict[str, Any] = every(rank, world, TWO, root)
    with patch.object(Bucket, "gather", lambda self: None):
        found["forgotten"] = train(rank, world, *TWO["dp2"], True)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Return what every rank found, by case, and where the states are."""
    root = tmp_path_factory.mktemp("states")
    found: dict[str, list[Any]] = {"root": [root]}
    for ranks in (run_ranks(two_ranks, 2, root, timeout=240), run_ranks(every, 4, FOUR, root, timeout=240)):
        found |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return found


@pytest.mark.processes
@pytest.mark.parametrize("case", [*TWO, *FOUR])
def test_weights_are_those_of_a_whole_optimizer_bit_for_bit(case: str, trained: dict[str, list[Any]]) -> None:
    for whole, shared in trained[case]:
        assert shared["curve"] == whole["curve"] and max(whole["curve"][1]) > 0.5, "clipping must have acted"
        assert not [n for n, value in whole["weights"].items() if not torch.equal(value, shared["weights"][n])]


@pytest.mark.slow
@pytest.mark.processes
def test_virtual_stages_some_weights_and_spread_experts_are_no_exception(tmp_path: Path) -> None:
    ranks = run_ranks(every, 4, SPECIAL, tmp_path, timeout=240)
    for case in SPECIAL:
        found = {case: [rank[case] for rank in ranks], "root": [tmp_path]}
        test_weights_are_those_of_a_whole_optimizer_bit_for_bit(case, found)
        test_training_states_are_those_of_a_whole_optimizer_bit_for_bit(case, found)


@pytest.mark.processes
@pytest.mark.parametrize("case", [*TWO, *FOUR])
def test_training_states_are_those_of_a_whole_optimizer_bit_for_bit(case: str, trained: dict[str, list[Any]]) -> None:
    root = trained["root"][0] / case
    parallel.ensure_initialized()
    whole, shared = (dist_checkpointing.load_plain_tensors(str(root / name)) for name in ("False", "True"))
    assert set(shared) == set(whole) and any(key.startswith("optimizer.state.exp_avg_sq") for key in whole)
    assert any(key.startswith("optimizer.state.master") for key in whole) == ("bf16" in case)
    assert not [key for key, value in whole.items() if not torch.equal(value, shared[key])]
    parallel.destroy()


class GoesOn(Callback):
    """Takes a state before the first step and writes it down again as the ranks of now hold it."""

    def __init__(self, state: Path, again: Path) -> None:
        self.state, self.again = state, again

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Fill weights and moments, and save them."""
        update = trainer.strategy.update  # type: ignore[attr-defined]
        update.load_weights(self.state, "the state")
        update.load_optimizers(2.0, self.state, "the state")
        self.again.mkdir(parents=True, exist_ok=True)
        barrier()
        sharded_files.save(update.state(), self.again)


def go_on(rank: int, world: int, root: Path) -> dict[str, Any]:
    """Go on from the state that two ranks have shared out."""
    again = GoesOn(root / "dp2" / "True", root / f"again{world}")
    return train(rank, world, {}, {"tied": True}, True, None, again)


@pytest.mark.processes
def test_two_ranks_shares_go_on_on_four(trained: dict[str, list[Any]]) -> None:
    [root] = trained["root"]
    two, four = (run_ranks(go_on, world, root) for world in (2, 4))
    parallel.ensure_initialized()
    written, *again = (dist_checkpointing.load_plain_tensors(str(root / n)) for n in ("dp2/True", "again2", "again4"))
    for found in again:
        assert set(found) == set(written)
        assert not [key for key, value in written.items() if not torch.equal(value, found[key])]
    parallel.destroy()
    assert four[0]["bytes"] < 0.55 * two[0]["bytes"]
    for rank in four:
        assert rank["curve"][0] == pytest.approx(two[0]["curve"][0], rel=1e-6)
        for name, value in two[0]["weights"].items():
            assert torch.allclose(rank["weights"][name], value, rtol=1e-6, atol=1e-6), name


@pytest.mark.processes
@pytest.mark.parametrize("case", SHARES)
def test_a_rank_holds_its_share_of_moments_and_masters(case: str, trained: dict[str, list[Any]]) -> None:
    for whole, shared in trained[case]:
        assert whole["bytes"] == whole["whole"] > 0
        assert 0.95 / SHARES[case] < shared["bytes"] / whole["whole"] < 1.05 / SHARES[case]


@pytest.mark.processes
def test_weights_that_do_not_come_back_are_noticed(trained: dict[str, list[Any]]) -> None:
    whole = trained["dp2"][0][0]["weights"]
    for rank in trained["forgotten"]:
        assert any(not torch.equal(value, rank["weights"][name]) for name, value in whole.items())


@pytest.mark.processes
@pytest.mark.parametrize("case", ["dp2", "dp4", "dp2_pp2_bf16"])
def test_buckets_leave_while_the_backward_pass_runs(case: str, trained: dict[str, list[Any]]) -> None:
    """From the second step on all but those that other sums precede; the first step learns what comes twice."""
    for rank in trained[case]:
        for one in rank:
            counts = [total for _, total in one["early"]]
            assert min(counts) > 1 and [sent for sent, _ in one["early"]] == [0, *counts[1:]]


class Twice(torch.nn.Module):
    """A linear that a backward pass reaches twice, because both its runs are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.config = type("Config", (), {"num_moe_experts": None})()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it twice."""
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=True)
        return x


def test_a_parameter_with_two_gradients_in_a_backward_pass_waits_for_both() -> None:
    parallel.ensure_initialized()
    chunk = Twice()
    ours = gradients.Gradients([chunk])
    for _ in range(3):
        ours.zero()
        with chunk.config.no_sync_func():
            pass
        chunk(torch.randn(2, 4, requires_grad=True)).sum().backward()
        assert not any(bucket.sent for bucket in ours.buckets)
        ours.finish(torch.tensor(1))
        assert all(bucket.sent for bucket in ours.buckets)
    hasty = gradients.Gradients([chunk])
    hasty._queue._early = True
    with chunk.config.no_sync_func():
        pass
    with pytest.raises(AssertionError, match="after its bucket was sent"):
        chunk(torch.randn(2, 4, requires_grad=True)).sum().backward()
    parallel.destroy()


class Whole(torch.optim.Optimizer):
    """An optimizer that may look at whole tensors."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})


def refused(rank: int, world: int) -> tuple[str, bool]:
    """Ask for a distributed optimizer of another kind, then leave the choice to the strategy."""
    module = StandIn()
    module.configure_optimizers = lambda: Whole(module.parameters())  # type: ignore[method-assign]
    strict = trainer_for({"distributed_optimizer": True}, world, rank)
    with pytest.raises(ConfigError) as error:
        strict.fit(module, datamodule=Rows())
    free = trainer_for({}, world, rank)
    free.strategy.connect(module)
    return str(error.value), free.strategy._shares_out([Whole(module.parameters())])  # type: ignore[attr-defined]


@pytest.mark.processes
def test_an_optimizer_that_may_look_at_whole_tensors_is_not_shared_out() -> None:
    for message, shared in run_ranks(refused, 2):
        assert message == (
            "distributed_optimizer=True cannot share out Whole, which may look at whole tensors; "
            "valid: Adam, AdamW, or distributed_optimizer=False."
        )
        assert not shared
