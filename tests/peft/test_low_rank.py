"""A frozen linear and its LoRA as one function: plain autograd's values, what it keeps, and where it is not taken."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.batch import Batch
from graftwork.peft import IA3, PEFT, CanonicalLoRA, DoRA, LoRA
from graftwork.peft.low_rank import low_rank_linear
from graftwork.peft.methods import lora
from tests.contracts.methods import adapter_parameters, loss, make, shake

SCALE = 0.7


def given(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    sizes = {"x": (5, 2, 8), "weight": (6, 8), "bias": (6,), "A": (3, 8), "B": (6, 3)}
    generator = torch.Generator().manual_seed(0)
    made = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in sizes.items()}
    return {n: t if n == "weight" else t.requires_grad_() for n, t in made.items()}


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, A), B)


@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_plain_autograd(biased: bool) -> None:
    of = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).transpose(0, 1)
    found = []
    for function in (low_rank_linear, plain):
        tensors = given()
        out = function(**{**tensors, "bias": tensors["bias"] if biased else None}, scale=SCALE)
        out.backward(of)
        found.append([out.detach(), *(t.grad for n, t in tensors.items() if n != "weight" and (biased or n != "bias"))])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_what_does_not_learn_gets_nothing(frozen: str) -> None:
    tensors = given()
    tensors[frozen].requires_grad_(False)
    low_rank_linear(**tensors, scale=SCALE).sum().backward()
    assert tensors[frozen].grad is None and all(
        t.grad is not None for n, t in tensors.items() if n in {*"xAB"} - {frozen}
    )


def test_it_keeps_its_input_and_the_low_rank_values() -> None:
    tensors, kept = given(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank_linear(**tensors, scale=SCALE)
    mine = {t.data_ptr() for t in tensors.values()}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in mine] == [(10, 3)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often it is used."""
    calls: list[int] = []

    def note(*arguments: Any) -> Tensor:
        calls.append(1)
        return low_rank_linear(*arguments)

    monkeypatch.setattr(lora, "low_rank_linear", note)
    return calls


@pytest.mark.parametrize(
    ("stack", "family", "times"),
    [
        ([LoRA(dim=4)], "llama", 8),
        ([LoRA(dim=4)], "gpt2", 8),
        ([LoRA(dim=4, dropout=0.5)], "llama", 0),
        ([DoRA(dim=4)], "llama", 0),
        ([LoRA("one", dim=4), LoRA("two", dim=4)], "llama", 8),  # the inner one
        ([LoRA(dim=4), IA3()], "llama", 8),
        ([IA3(), LoRA(dim=4)], "llama", 4),
        ([LoRA(dim=4, target_modules=["output_layer"])], "llama", 0),
    ],
    ids=lambda value: "+".join(one.name for one in value) if isinstance(value, list) else str(value),
)
def test_a_model_learns_the_same_with_it_and_without(
    stack: list[PEFT], family: str, times: int, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family).train()
    model.double()
    model.add_adapter(stack)
    model.double()
    shake(model)
    results = []
    for usable in (True, False):
        if not usable:
            monkeypatch.setattr(lora, "is_whole", lambda _: False)
        torch.manual_seed(0)
        loss(model).backward()
        results.append({name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None})
        model.zero_grad()
    assert len(taken) == times
    for name, wanted in results[1].items():
        assert (results[0][name] - wanted).abs().max() <= 1e-10 * wanted.abs().max(), name


def test_rows_that_go_other_ways_do_without(taken: list[int]) -> None:
    from graftwork.routes import Routes

    model = make("llama")
    model.add_adapter(LoRA(dim=4))
    batch = Batch.of(torch.zeros(2, 4, dtype=torch.int64))
    with torch.no_grad(), model.routed(Routes.of_rows([("lora",), ()])):
        model.run_chunk(model.chunks[0], batch)
    assert not taken


@pytest.mark.parametrize("method", [LoRA, CanonicalLoRA, DoRA])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_a_norm_is_computed_once_for_the_linear_and_its_adapters(
    method: type[PEFT], recompute: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama", recompute=recompute).train()
    model.add_adapter(method(dim=4))
    norms, exact = [], F.rms_norm

    def note(*arguments: Any) -> Tensor:
        norms.append(1)
        return exact(*arguments)

    monkeypatch.setattr(F, "rms_norm", note)
    loss(model).backward()
    layers = 2 * 2  # of each layer one in front of the attention and one in front of the MLP
    assert len(norms) == layers * (2 if recompute else 1) + 1


def test_gradients_stop_at_the_lowest_adapter() -> None:
    model = make("llama", {"num_layers": 3})
    model.add_adapter(LoRA(dim=4, layers=[1, 2]))
    seen = {}
    for index, layer in enumerate(model.module.decoder.layers):
        layer.register_forward_hook(lambda _, __, out, i=index: seen.update({i: out[0].requires_grad}))
    loss(model)
    assert seen == {0: False, 1: True, 2: True}
