"""(IA)3 in experts and on the fused keys and values of cross attention; where attention is scaled."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError, MatchError
from graftwork.parallel.fused import KVRows
from graftwork.parallel.record import record_of
from graftwork.peft import IA3, report
from graftwork.peft.adapter import Birth
from graftwork.peft.methods.ia3 import ScaledKeyValue
from tests.contracts.methods import make, shake, tokens

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}


def scaled_input(scale: Tensor, _: nn.Module, inputs: Any) -> Any:
    return (inputs[0] * scale, *inputs[1:])


def test_every_expert_has_a_vector_of_its_own() -> None:
    ours, bare = make(sizes=EXPERTS), make(sizes=EXPERTS)
    ours.add_adapter(IA3(targets=["ffn"]))
    shake(ours, 0.5)
    copies = []
    for item in ours.stack.grafted["ia3"]:
        copies.append(item.adapter.scale_ffn.detach().clone().requires_grad_())
        module = bare.module.get_submodule(item.site.path)
        module.register_forward_pre_hook(partial(scaled_input, copies[-1]))
        assert item.site.in_expert and record_of(item.adapter.scale_ffn).expert
    assert len(copies) == 2 * 4 and sum(r.parameters for r in report.sites(ours.stack)) == 2 * 4 * 24
    for parameter in bare.parameters():
        parameter.requires_grad_(False)
    found, wanted = ours(tokens()), bare(tokens())
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    for logits in (found, wanted):
        logits.square().mean().backward()
    for item, copy in zip(ours.stack.grafted["ia3"], copies, strict=True):
        assert torch.allclose(item.adapter.scale_ffn.grad, copy.grad, rtol=1e-5, atol=1e-6)
    assert len({float(copy.grad.abs().sum()) for copy in copies}) == len(copies)


@pytest.mark.parametrize("targets", [["k"], ["v"], ["k", "v"]])
def test_keys_and_values_of_cross_attention_stand_head_by_head(targets: list[str]) -> None:
    """megatron-core splits linear_kv's output into [heads, 2, width]."""
    heads, width = 4, 6
    adapter = ScaledKeyValue(Birth(1, "ia3", "linear_kv", torch.device("cpu")), KVRows(heads, width), targets)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    plain = torch.randn(5, 2, heads * 2 * width)
    scaled = adapter(lambda x: (x, None), plain)[0].view(5, 2, heads, 2, width)
    for place, target in enumerate("kv"):
        scale = getattr(adapter, f"scale_{target}", torch.ones(heads * width)).view(heads, width)
        assert torch.equal(scaled[:, :, :, place], plain.view(5, 2, heads, 2, width)[:, :, :, place] * scale)
    weight, bias = adapter.merged_weights(torch.eye(heads * 2 * width), torch.ones(heads * 2 * width))
    assert torch.allclose(plain @ weight.T, scaled.reshape(plain.shape)) and torch.equal(bias, weight.diagonal())


def test_attention_is_chosen_among_what_the_model_has() -> None:
    model = make()
    with pytest.raises(MatchError, match=r"attention has 'cross', which this model lacks; valid: self\.") as caught:
        model.add_adapter(IA3(attention=["self", "cross"]))
    assert "\n" not in str(caught.value) and not model.adapters
    model.add_adapter(IA3(attention=["self"], targets=["v"]))
    assert {item.site.leaf for item in model.stack.grafted["ia3"]} == {"linear_qkv"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": []}, "attention says where k and v are scaled, but is empty"),
        ({"attention": ["self"], "targets": ["ffn"]}, "targets names neither of them"),
        ({"attention": ["crss"]}, "attention is 'crss'; did you mean 'cross'"),
    ],
)
def test_a_choice_without_a_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IA3(**options)
