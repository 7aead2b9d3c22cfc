"""Only what a stack adds trains, all of it does, and the base keeps every bit."""

import pytest
import torch

from graftwork.optim import AdamW
from tests.contracts.methods import (
    STACKS,
    adapter_parameters,
    base_values,
    beside_the_base,
    every_family,
    every_stack,
    loss,
    make,
    same,
    shake,
)


@every_family
@every_stack
def test_only_adapters_train_and_every_one_moves(family: str, stack: str) -> None:
    model = make(family)
    model.add_adapter(STACKS[stack]())
    before, born = base_values(model), {n: p.detach().clone() for n, p in adapter_parameters(model)}
    assert not any(adapter.moved() for adapter in model.stack.adapters())
    optimizer, _ = AdamW(lr=3e-3, schedule="constant").build(model, 3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        step = loss(model)
        step.backward()
        losses.append(float(step.detach()))
        for name, parameter in model.named_parameters():
            if name in born:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            else:
                assert parameter.grad is None and not parameter.requires_grad, name
        optimizer.step()
    assert losses[-1] < losses[0]
    assert same(base_values(model), before)
    for name, parameter in adapter_parameters(model):
        assert not torch.equal(parameter, born[name]), f"{name} never moved"
    assert all(adapter.moved() for adapter in model.stack.adapters())


@every_stack
def test_adapters_hold_fp32_over_a_bf16_base(stack: str) -> None:
    model = make(dtype="bf16")
    model.add_adapter(STACKS[stack]())
    loss(model).backward()
    added = beside_the_base(model)
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if n not in added)
    for name, parameter in adapter_parameters(model):
        assert parameter.dtype == parameter.grad.dtype == (torch.float32 if name in added else torch.bfloat16), name
        assert torch.isfinite(parameter.grad).all()
    exact = make(dtype="fp32")
    exact.load_state_dict(model.state_dict(), strict=False)
    exact.add_adapter(STACKS[stack]())
    assert float(loss(model).detach()) == pytest.approx(float(loss(exact).detach()), rel=2e-2)


@every_family
@every_stack
def test_recomputation_over_a_frozen_embedding_gives_the_same_gradients(family: str, stack: str) -> None:
    """Peers silently get no gradients at all here, when the embedding is frozen and the pipeline has one stage."""
    plain, recomputed = make(family).train(), make(family, recompute="full").train()
    found = []
    for model in (plain, recomputed):
        model.add_adapter(STACKS[stack]())
        shake(model, 0.1)
        loss(model).backward()
        found.append({n: p.grad for n, p in adapter_parameters(model)})
    assert list(found[0]) == list(found[1])
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(found[1][name], gradient, rtol=1e-5, atol=1e-7), name
