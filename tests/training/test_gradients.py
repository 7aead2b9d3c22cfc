"""Clipping and fp32 accumulation of the gradients, on one process."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from graftwork import parallel
from graftwork.optim import AdamW, gradient_of
from graftwork.parallel.record import give_to
from graftwork.training.optimizer import Update, gradients
from graftwork.training.optimizer.gradients import Gradients, all_reduce
from tests.helpers import tiny_gpt
from tests.helpers.standin import Rows, StandIn, trainer_for


class Chunk(nn.Module):
    """A linear that looks like a megatron-core chunk."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16).to(dtype)
        self.config = SimpleNamespace(num_moe_experts=None)


def made(dtype: torch.dtype = torch.float32) -> tuple[Chunk, Gradients]:
    parallel.ensure_initialized()
    torch.manual_seed(0)
    chunk = Chunk(dtype)
    return chunk, Gradients([chunk])


def test_norm_and_clipping_equal_torch() -> None:
    chunk, ours = made()
    chunk.linear(torch.randn(8, 16)).square().sum().backward()
    twin = [nn.Parameter(p.detach().clone()) for p in chunk.parameters()]
    for copy, parameter in zip(twin, chunk.parameters()):
        copy.grad = parameter.grad.clone() / 8  # type: ignore[union-attr]
    ours.finish(torch.tensor(8))
    norm = torch.nn.utils.clip_grad_norm_(twin, 0.5)
    ours.clip(0.5)
    assert float(ours.norm) == pytest.approx(float(norm), rel=1e-6) and float(norm) > 0.5
    for copy, parameter in zip(twin, chunk.parameters()):
        torch.testing.assert_close(parameter.grad, copy.grad)
    ours.clip_values(0.01)
    assert all(float(p.grad.abs().max()) <= 0.01 for p in chunk.parameters())  # type: ignore[union-attr]


def test_the_norm_is_told_by_owner() -> None:
    parallel.ensure_initialized()
    chunk = Chunk(torch.float32)
    give_to(chunk.linear.weight, "lora")
    ours = Gradients([chunk])
    chunk.linear(torch.randn(8, 16)).square().sum().backward()
    ours.finish(torch.tensor(8))
    parts = {"base": chunk.linear.bias, "lora": chunk.linear.weight}
    wanted = {name: float(p.grad.norm()) for name, p in parts.items()}  # type: ignore[union-attr]
    assert {name: float(norm) for name, norm in ours.norms.items()} == pytest.approx(wanted, rel=1e-6)
    assert float(ours.norm) == pytest.approx(sum(norm**2 for norm in wanted.values()) ** 0.5, rel=1e-6)


def test_low_precision_gradients_accumulate_in_fp32() -> None:
    """Many small microbatches after a large one: bf16 sums would lose them."""
    chunk, ours = made(torch.bfloat16)
    ours.zero()
    bias = chunk.linear.bias
    for scale in [256.0, *([0.5] * 100)]:
        (bias * scale).sum().backward()
    assert bias.grad is None
    assert torch.equal(gradient_of(bias), torch.full((16,), 306.0))
    ours.zero()
    assert not gradient_of(bias).any()  # type: ignore[union-attr]
    ours.release()
    assert not hasattr(bias, "main_grad")
    bias.sum().backward()
    assert bias.grad is not None


def test_nothing_is_sent_in_a_group_of_one(monkeypatch: Any) -> None:
    parallel.ensure_initialized()
    monkeypatch.setattr(gradients.dist, "all_reduce", lambda *_, **__: pytest.fail("sent"))
    all_reduce([torch.ones(3)], parallel.tp_group())


def test_buckets_hold_one_dtype_and_a_limited_size(monkeypatch: Any) -> None:
    monkeypatch.setattr(gradients, "BUCKET_ELEMENTS", 10)
    tensors = [torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(40), torch.zeros(2)]
    buckets = [[t.numel() for t in b] for b in gradients._parts(tensors)]
    assert buckets == [[4, 4], [40], [2], [4]]


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 1e-3), ("value", 1e-6)])
def test_the_trainers_clipping_reaches_the_update(algorithm: str, limit: float) -> None:
    """SGD-like check: with a huge eps the step is proportional to the gradient."""
    parallel.ensure_initialized()
    fresh = tiny_gpt.build(tiny_gpt.config(num_layers=2)).decoder.final_layernorm.weight.detach()
    moved = {}
    for clip in (None, limit):
        module = StandIn(train="final_layernorm", optim=AdamW(lr=1e3, eps=1e3))
        options = {"gradient_clip_val": clip, "gradient_clip_algorithm": algorithm} if clip else {}
        trainer_for({}, max_steps=1, limit_val_batches=0, **options).fit(module, datamodule=Rows())
        weight = module.module.decoder.final_layernorm.weight.detach()
        moved[clip] = float((weight - fresh).abs().max())
    assert moved[limit] < moved[None] / 2


class Looks(Callback):
    """Remembers what Lightning shows before a step, and the gradients' largest element then."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.shown.append(optimizer)
        self.seen.append(max(float(p.grad.abs().max()) for p in pl_module.parameters() if p.grad is not None))


def test_every_step_goes_through_the_update_after_the_hooks(monkeypatch: Any) -> None:
    """Callbacks meet torch's optimizer, not the update; without the update nothing moves."""
    made_by: list[Any] = []
    exact = Update.step

    def step(self: Update, optimizer: Any, closure: Any) -> float:
        made_by.append(optimizer)
        return exact(self, optimizer, closure)

    monkeypatch.setattr(Update, "step", step)
    module, looks = StandIn(train="final_layernorm"), Looks()
    trainer_for({}, max_steps=3, limit_val_batches=0, callbacks=[looks]).fit(module, datamodule=Rows())
    assert made_by == looks.shown and len(made_by) == 3 and isinstance(made_by[0], torch.optim.Optimizer)
    assert min(looks.seen) > 0
    monkeypatch.setattr(Update, "step", lambda self, optimizer, closure: closure())
    still = StandIn(train="final_layernorm")
    fresh = tiny_gpt.build(tiny_gpt.config(num_layers=2)).decoder.final_layernorm.weight
    trainer_for({}, max_steps=1, limit_val_batches=0).fit(still, datamodule=Rows())
    assert torch.equal(still.module.decoder.final_layernorm.weight, fresh)
    assert not torch.equal(module.module.decoder.final_layernorm.weight, fresh)


def test_the_state_outlives_the_gradient_buffers() -> None:
    """A state can be taken before a fit and after it; what accumulates ends with it."""
    parallel.ensure_initialized()
    chunk = tiny_gpt.build(tiny_gpt.config(num_layers=2, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16))
    update = Update([chunk])
    assert update.steps_made() == 0 and not any("/exp_avg" in name for name in update.state())
    optimizer, _ = AdamW(schedule="constant").build(chunk, 1)
    update.accumulate()
    update.step_with([optimizer])
    update.zero()
    optimizer.step()
    update.release()
    assert update.steps_made() == 1 and not any(hasattr(p, "main_grad") for p in chunk.parameters())
    kinds = {name.rpartition("/")[2] for name in update.state()}
    assert {"exp_avg", "exp_avg_sq", "master"} <= kinds
