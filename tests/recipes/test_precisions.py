"""The model of every recipe trains in its own precision, in fp32 and in bf16, with every method and without one."""

from typing import Any

import fiddle as fdl
import pytest
import torch

from graftwork.models import Model
from graftwork.models.precision import resolve_dtype
from graftwork.models.shapes import Shape
from graftwork.optim import AdamW
from graftwork.peft import METHODS
from graftwork.recipes import RECIPES
from tests.contracts.methods import adapter_parameters, base_values, batch, same, tiny

VOCABULARY, STEPS = 61, 3


def tiny_model(name: str, dtype: str | None) -> Model:
    """Return a recipe's model in a tiny shape: family, norms, activation, positions, ties and query groups are its own.

    ``dtype`` None keeps the recipe's.
    """
    config = RECIPES[name].model()
    heads = _tiny_heads(fdl.build(config.shape))
    sizes = {"num_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, **heads}
    if config.shape.num_moe_experts is not None:  # both experts see every token, so that both learn from few
        sizes |= {"num_moe_experts": 2, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
    for field, value in sizes.items():
        setattr(config.shape, field, value)
    config.checkpoint = None
    config.dtype = dtype or config.dtype
    model: Model = fdl.build(config)
    return model


def _tiny_heads(full: Shape) -> dict[str, int]:
    per_group = full.num_attention_heads // full.groups
    groups = 4 if per_group == 1 else 2
    hidden = groups * per_group * 8
    own = {} if full.channels * full.num_attention_heads == full.hidden_size else {"kv_channels": 16}
    return {
        **own,
        "num_attention_heads": groups * per_group,
        "num_query_groups": groups,
        "hidden_size": hidden,
        "ffn_hidden_size": hidden * 2,
    }


def kinds() -> list[Any]:
    """Return each model kind that recipes differ in once, at each of its precisions."""
    seen, found = set(), []
    for name in RECIPES:
        for dtype in (None, "fp32", "bf16"):
            model = tiny_model(name, dtype)
            kind = (model.shape, model.recompute, resolve_dtype(model.dtype_name, None))
            if kind not in seen:
                seen.add(kind)
                found.append(pytest.param(name, dtype, id=f"{name}-{dtype or 'default'}"))
    return found


every_kind = pytest.mark.parametrize("name, dtype", kinds())


def train(model: Model) -> list[float]:
    """Return the losses of three steps on one batch."""
    optimizer, schedule = AdamW(lr=3e-3, schedule="constant").build(model, STEPS)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        output, loss_function = model.forward_step(iter([batch(model)]), model.chunks[0])
        total, count, _ = loss_function(output)
        (total / count).backward()
        losses.append(float(total.detach() / count))
        optimizer.step()
        schedule.step()
    return losses


@every_kind
def test_every_method_trains(name: str, dtype: str | None) -> None:
    model = tiny_model(name, dtype)
    model.configure_model()
    model.train()
    wanted = resolve_dtype(model.dtype_name, None)
    assert {p.dtype for p in model.parameters()} == {wanted}
    for method in METHODS.values():
        model.add_adapter(tiny(method))
        before, born = base_values(model), {n: p.detach().clone() for n, p in adapter_parameters(model)}
        assert torch.isfinite(torch.tensor(train(model))).all(), method
        assert same(base_values(model), before), method
        for parameter_name, parameter in adapter_parameters(model):
            assert torch.isfinite(parameter).all() and not torch.equal(parameter, born[parameter_name]), parameter_name
        (attached,) = model.adapters
        model.delete_adapter(attached)


@every_kind
def test_full_fine_tuning_trains(name: str, dtype: str | None) -> None:
    model = tiny_model(name, dtype)
    model.configure_model()
    model.train()
    before = base_values(model)
    losses = train(model)
    assert torch.isfinite(torch.tensor(losses)).all() and losses[-1] < losses[0]
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, before[parameter_name]), parameter_name
