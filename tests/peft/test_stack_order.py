"""Several methods on one site act inner to outer in list order: outputs equal a formula over dense weights."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.layers import normalized_input
from graftwork.models import GPT
from graftwork.peft import IA3, PEFT, CanonicalAdapter, LoRA
from tests.contracts.methods import make, shake, tokens

TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def adapted(*transforms: PEFT) -> tuple[GPT, Any]:
    model = make("gpt2")  # its linears have biases
    model.add_adapter(list(transforms))
    shake(model)
    return model, model.module.decoder.layers[1]


def hidden(width: int) -> Tensor:
    return torch.randn(5, 2, width, generator=torch.Generator().manual_seed(1))


def update(x: Tensor, adapter: Any, scale: float = 8.0) -> Tensor:
    return scale * x @ adapter.lora_A.T @ adapter.lora_B.T


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def key_value_scale(adapter: Any, heads: int = 4, width: int = 8) -> Tensor:
    """Factors on the rows of the fused linear, [group: queries, key, value] after one another."""
    rows = []
    for group in range(heads):
        part = slice(group * width, (group + 1) * width)
        rows += [torch.ones(width), adapter.scale_k[part], adapter.scale_v[part]]
    return torch.cat(rows)


def test_ia3_around_lora_scales_its_output_and_its_input() -> None:
    _, layer = adapted(LoRA(dim=4), IA3())
    qkv, fc2 = layer.self_attention.linear_qkv, layer.mlp.linear_fc2
    x, y = hidden(32), hidden(48)
    normed, ia3, lora = normalized_input(qkv, x), qkv.adapters["ia3"], qkv.adapters["lora"]
    scale = key_value_scale(ia3)
    wanted = (F.linear(normed, qkv.weight, qkv.bias) + update(normed, lora)) * scale
    assert close(qkv(x)[0], wanted)
    scaled = y * fc2.adapters["ia3"].scale_ffn
    assert close(fc2(y)[0], F.linear(scaled, fc2.weight) + update(scaled, fc2.adapters["lora"]))


def test_lora_around_ia3_is_not_scaled() -> None:
    _, layer = adapted(IA3(), LoRA(dim=4))
    qkv, fc2 = layer.self_attention.linear_qkv, layer.mlp.linear_fc2
    x, y = hidden(32), hidden(48)
    normed, ia3, lora = normalized_input(qkv, x), qkv.adapters["ia3"], qkv.adapters["lora"]
    wanted = F.linear(normed, qkv.weight, qkv.bias) * key_value_scale(ia3) + update(normed, lora)
    assert close(qkv(x)[0], wanted)
    inner = F.linear(y * fc2.adapters["ia3"].scale_ffn, fc2.weight)
    assert close(fc2(y)[0], inner + update(y, fc2.adapters["lora"]))


def test_ia3_scales_a_bias_that_is_added_later() -> None:
    """A linear may hand its bias on instead of adding it."""
    _, layer = adapted(IA3())
    ia3, output, bias = layer.self_attention.linear_qkv.adapters["ia3"], hidden(96), torch.randn(96)
    scaled, scaled_bias = ia3(lambda x: (x, bias), output)
    assert close(scaled + scaled_bias, (output + bias) * key_value_scale(ia3))


def test_two_bottlenecks_on_one_site() -> None:
    """The second reads what the first has made."""
    _, layer = adapted(CanonicalAdapter("first", dim=6), CanonicalAdapter("second", dim=6))
    mlp, x = layer.mlp, hidden(32)
    h = mlp.base(x)[0]
    for name in ("first", "second"):
        a = mlp.adapters[name]
        h = h + F.silu(F.layer_norm(h, (32,), a.norm_weight, a.norm_bias, 1e-5) @ a.linear_in.T) @ a.linear_out.T
    assert close(mlp(x)[0], h)


def test_the_bottleneck_reads_base_plus_lora_without_the_bias() -> None:
    _, layer = adapted(LoRA(dim=4), CanonicalAdapter(dim=6))
    mlp, x = layer.mlp, hidden(32)
    fc1, fc2, a = mlp.linear_fc1, mlp.linear_fc2, mlp.adapters["canonical_adapter"]
    normed = normalized_input(fc1, x)
    inside = F.gelu(F.linear(normed, fc1.weight, fc1.bias) + update(normed, fc1.adapters["lora"]), approximate="tanh")
    h = F.linear(inside, fc2.weight) + update(inside, fc2.adapters["lora"])
    wanted = h + F.silu(F.layer_norm(h, (32,), a.norm_weight, a.norm_bias, 1e-5) @ a.linear_in.T) @ a.linear_out.T
    output, bias = mlp(x)
    assert close(output, wanted) and torch.equal(bias, fc2.bias)


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"activation": "relu"}, lambda h, a, n: h + F.relu(n(h) @ a.linear_in.T) @ a.linear_out.T),
        ({"activation": "gelu"}, lambda h, a, n: h + F.gelu(n(h) @ a.linear_in.T) @ a.linear_out.T),
        ({"norm_position": "post"}, lambda h, a, n: h + n(F.silu(h @ a.linear_in.T) @ a.linear_out.T)),
    ],
)
def test_bottleneck_options(options: dict[str, Any], formula: Any) -> None:
    _, layer = adapted(CanonicalAdapter(dim=6, **options))
    mlp, x = layer.mlp, hidden(32)
    a = mlp.adapters["canonical_adapter"]
    wanted = formula(mlp.base(x)[0], a, lambda h: F.layer_norm(h, (32,), a.norm_weight, a.norm_bias, 1e-5))
    assert close(mlp(x)[0], wanted)


def test_order_does_not_matter_on_disjoint_sites() -> None:
    first = [
        LoRA(dim=4, target_modules=["linear_fc1"]),
        IA3(targets=["k", "v"]),
        CanonicalAdapter(sites=["mlp"], dim=4),
    ]
    models = [make(), make()]
    for model, order in zip(models, (first, first[::-1])):
        model.add_adapter([type(t)(**t.hyperparameters()) for t in order])
    shake(models[0])
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[0](tokens()), models[1](tokens()))


def test_order_matters_on_one_site() -> None:
    models = [make(), make()]
    models[0].add_adapter([LoRA(dim=4), IA3()])
    models[1].add_adapter([IA3(), LoRA(dim=4)])
    shake(models[0])
    models[1].load_state_dict(models[0].state_dict())
    assert (models[0](tokens()) - models[1](tokens())).abs().max() > 1e-2
