"""DoRA: equal to Hugging Face PEFT's, its norms, its biases, what it may stand at."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.errors import ConfigError, MatchError
from graftwork.models import GPT
from graftwork.peft import IA3, DoRA, LoRA
from graftwork.peft.cuts import Region, Replicated
from tests.contracts.methods import adapter_parameters, loss, make, shake, tokens
from tests.peft import hf_lora
from tests.peft.hf_lora import assert_close

FAMILIES = ["llama", "llama_bias", "llama_wide_heads", "gpt2"]
TENSORS = ("A", "B", "magnitude")


def with_one_a(ours: GPT, theirs: nn.Module) -> list[tuple[Any, list[Any], Tensor]]:
    """Copy our values; linears that we fuse get one A, as ours have, so that both train the same function."""
    found: dict[int, tuple[Any, list[Any], list[Tensor]]] = {}
    for adapter, layer, rows in hf_lora.pairs(ours, theirs, "dora"):
        _, layers, places = found.setdefault(id(adapter), (adapter, [], []))
        layers.append(layer)
        places.append(rows)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(adapter.lora_A)
            layer.lora_B["default"].weight.copy_(adapter.lora_B[rows])
            layer.lora_magnitude_vector["default"].weight.copy_(adapter.magnitude[rows])
        layer.lora_A["default"].weight = layers[0].lora_A["default"].weight
    return [(adapter, layers, torch.cat(places)) for adapter, layers, places in found.values()]


def of(layers: list[Any], tensor: str) -> list[Tensor]:
    """Return their parameters of one kind."""
    if tensor == "A":
        return [layers[0].lora_A["default"].weight]
    if tensor == "B":
        return [layer.lora_B["default"].weight for layer in layers]
    return [layer.lora_magnitude_vector["default"].weight for layer in layers]


def ours_of(adapter: Any, tensor: str, rows: Tensor, gradient: bool = False) -> Tensor:
    """Return our parameter, or its gradient, in the order of their rows."""
    parameter = adapter.magnitude if tensor == "magnitude" else getattr(adapter, f"lora_{tensor}")
    value = parameter.grad if gradient else parameter
    return value if tensor == "A" else value[rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_hugging_face_peft_s(family: str, tmp_path: Path) -> None:
    """Outputs, gradients, and all weights after three steps."""
    ours, theirs = hf_lora.both(family, tmp_path / "hf", DoRA(dim=4, alpha=8), use_dora=True)
    sites = with_one_a(ours, theirs)
    mine, other = (torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], eps=1e-3) for m in (ours, theirs))
    for step in range(3):
        found, wanted = ours(hf_lora.tokens(step)), theirs(hf_lora.tokens(step)).logits
        assert_close(found, wanted, f"logits of step {step}")
        for optimizer, logits in ((mine, found), (other, wanted)):
            optimizer.zero_grad()
            hf_lora.loss(logits, step).backward()
        for adapter, layers, rows in sites:
            for tensor in TENSORS:
                gradient = torch.cat([p.grad for p in of(layers, tensor)])
                assert_close(ours_of(adapter, tensor, rows, gradient=True), gradient, f"gradient of {tensor}")
        mine.step()
        other.step()
    for adapter, layers, rows in sites:
        for tensor in TENSORS:
            assert_close(ours_of(adapter, tensor, rows), torch.cat(of(layers, tensor)), f"trained {tensor}")


def test_its_magnitudes_are_born_as_peft_s(tmp_path: Path) -> None:
    """Also where the update does not start at zero."""
    options = {"lora_A_init_method": "kaiming", "lora_B_init_method": "normal"}
    ours, theirs = hf_lora.both("llama", tmp_path / "hf", DoRA(dim=4, alpha=8, **options), use_dora=True)
    for item in ours.stack.grafted["dora"]:
        a, base = item.adapter, item.site.module
        assert torch.allclose(a.norm(), (base.weight + 2 * a.lora_B @ a.lora_A).norm(dim=1), rtol=1e-6)
    ours.delete_adapter("dora")
    ours.add_adapter(DoRA(dim=4))
    for adapter, layer, rows in hf_lora.pairs(ours, theirs, "dora"):
        assert_close(adapter.magnitude[rows], layer.lora_magnitude_vector["default"].weight, "magnitude")


def test_dropout_is_peft_s(tmp_path: Path) -> None:
    """In training the magnitude acts on a product with dropped values, which PEFT computes beside the base's own."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(32, 96, bias=False))
    config = peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=8, lora_dropout=0.5, use_dora=True)
    theirs = peft.get_peft_model(linear, config).train()
    model = make(sizes={"num_layers": 1})
    model.add_adapter(DoRA(dim=4, alpha=8, dropout=0.5, target_modules=["linear_fc1"]))
    shake(model, 0.1)
    (item,) = model.stack.grafted["dora"]
    layer, adapter = theirs.base_model.model[0], item.adapter.train()
    with torch.no_grad():
        layer.base_layer.weight.copy_(item.site.module.weight)
        for tensor, value in zip(TENSORS, (adapter.lora_A, adapter.lora_B, adapter.magnitude)):
            of([layer], tensor)[0].copy_(value)
    x = torch.randn(5, 2, 32)
    norm = F.rms_norm(x, (32,), item.site.module.layer_norm_weight, item.site.module.eps)
    torch.manual_seed(1)
    found = model.module.decoder.layers[0].mlp.linear_fc1(x)[0]
    torch.manual_seed(1)
    wanted = theirs(norm)
    assert_close(found, wanted, "output")
    found.square().sum().backward()
    wanted.square().sum().backward()
    for tensor, parameter in zip(TENSORS, (adapter.lora_A, adapter.lora_B, adapter.magnitude)):
        assert_close(parameter.grad, of([layer], tensor)[0].grad, f"gradient of {tensor}")


def test_norms_are_exact_where_the_update_takes_the_weight_away() -> None:
    """Sums of |W|^2, W A^T and A A^T would lose all digits here; rows are changed block by block."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator) for shape in ((8, 5000), (3000, 8)))
    rest = 1e-3 * torch.randn(3000, 5000, generator=generator)
    weight = rest - B @ A
    wanted = (weight.double() + B.double() @ A.double()).norm(dim=1)
    found = Replicated(5000, 3000, Region()).norm(weight, (B, A))
    assert ((found - wanted) / wanted).abs().max() < 1e-4  # of what rounding the weight itself leaves
    plain = Replicated(5000, 3000, Region()).norm(weight)
    assert torch.allclose(plain.double(), weight.double().norm(dim=1), rtol=1e-6)


@pytest.mark.fault(
    "over a bf16 base DoRA's magnitudes act in steps of 0.8 %",
    "the scale stays fp32 until the output is rounded",
)
def test_a_magnitude_moves_in_steps_finer_than_bf16() -> None:
    model = make(dtype="bf16", sizes={"num_layers": 1})
    model.add_adapter(DoRA(dim=4, target_modules=["linear_fc2"]))
    (adapter,) = model.stack.adapters("dora")
    x = torch.ones(1, 1, 48, dtype=torch.bfloat16) * 1000
    linear = model.module.decoder.layers[0].mlp.linear_fc2
    with torch.no_grad():
        before = linear(x)[0]
        adapter.magnitude.mul_(1.002)  # bf16 knows nothing between 1 and 1.0078
        changed = linear(x)[0]
    assert changed.dtype == torch.bfloat16 and not torch.equal(changed, before)


@pytest.mark.fault(
    "a DoRA's norms are those of a weight that another adapter has been merged into",
    "they are taken of the weight that merging has kept",
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("inner", [LoRA, IA3])
def test_inner_adapters_are_scaled_and_merge_in_any_order(family: str, inner: Any) -> None:
    """Its norms stay those of the base's own weight, also while an inner adapter is merged into it."""
    model = make(family)
    model.add_adapter([inner(**({"dim": 4} if inner is LoRA else {})), DoRA(dim=4)])
    shake(model, 0.05)
    with torch.no_grad():
        live = model(tokens())
        model.merge_adapters([inner.short_name()])
        assert_close(model(tokens()), live, "inner merged")
        model.merge_adapters()
        assert_close(model(tokens()), live, "all merged")
        model.unmerge_adapters()
        assert torch.equal(model(tokens()), live)


def test_it_is_born_of_the_base_s_own_weight_while_another_is_merged() -> None:
    model = make()
    model.add_adapter(LoRA(dim=4))
    shake(model, 0.1)
    model.merge_adapters()
    model.add_adapter(DoRA(dim=4))
    model.unmerge_adapters()
    for item in model.stack.grafted["dora"]:
        assert torch.allclose(item.adapter.magnitude, item.site.module.weight.norm(dim=1), rtol=1e-6)


@pytest.mark.fault(
    "a row of zeros, as those that pad a vocabulary, makes DoRA's output and gradients NaN",
    "its scale is 1",
)
def test_a_row_of_zeros_stays_finite() -> None:
    """As the rows that pad a vocabulary."""
    model = make()
    with torch.no_grad():
        model.module.output_layer.weight[7] = 0
        model.module.decoder.layers[0].mlp.linear_fc2.weight[3] = 0
    model.add_adapter(DoRA(dim=4, target_modules=["output_layer", "linear_fc2"]))
    loss(model).backward()
    assert all(torch.isfinite(p.grad).all() for _, p in adapter_parameters(model))


def test_an_expert_s_linears_have_magnitudes_of_their_own() -> None:
    model = make(sizes={"num_moe_experts": 3, "moe_router_topk": 2, "moe_ffn_hidden_size": 24})
    with torch.no_grad():
        base = model(tokens())
        model.add_adapter(DoRA(dim=4))
        assert torch.equal(model(tokens()), base)
        shake(model, 0.05)
        live = model(tokens())
        model.merge_adapters()
        assert_close(model(tokens()), live, "merged")
    inside = [g for g in model.stack.grafted["dora"] if g.site.in_expert]
    assert len(inside) == 2 * 3 * 2
    assert {tuple(g.adapter.magnitude.shape) for g in inside} == {(48,), (32,)}


def test_where_it_cannot_stand_is_refused() -> None:
    with pytest.raises(ConfigError, match="word_embeddings is no linear whose rows have a magnitude; use a LoRA"):
        DoRA(target_modules=["linear_qkv", "embedding.word_embeddings"])
    model = make("llama_tied")
    with pytest.raises(MatchError, match="DoRA 'dora' cannot stand at output_layer: its weight is tied"):
        model.add_adapter(DoRA(target_modules=["output_layer"]))
    assert not model.adapters
    model.add_adapter(DoRA(target_modules=["*.linear_fc?"]))
    with pytest.raises(MatchError, match="'linear_q' matches no module; did you mean"):
        model.add_adapter(DoRA("second", target_modules=["linear_q"]))
