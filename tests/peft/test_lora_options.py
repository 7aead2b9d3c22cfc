"""LoRA's options: which sites, which ranks and scales, dropout, learning rates, embedding and output layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from graftwork.errors import ConfigError, MatchError
from graftwork.models import GPT
from graftwork.optim import AdamW
from graftwork.peft import IA3, PEFT, CanonicalAdapter, CanonicalLoRA, DoRA, LoRA, report
from graftwork.peft.adapter import INITIALIZERS
from tests.contracts.methods import every_family, loss, make, shake, tokens


def sites(model: GPT, name: str = "lora") -> dict[str, Any]:
    """Return the adapters of a transform by their global site names."""
    return {g.site.name: g.adapter for g in model.stack.grafted[name]}


def lora(sizes: dict[str, Any] | None = None, **options: Any) -> GPT:
    model = make(sizes=sizes)
    model.add_adapter(LoRA(**{"dim": 4, **options}))
    return model


@pytest.mark.parametrize(("layers", "count"), [([0], 4), ([1], 4), ([0, 1], 8), (None, 8)])
def test_layers(layers: list[int] | None, count: int) -> None:
    model = lora(layers=layers)
    found = sites(model)
    assert len(found) == count
    assert {int(n.split(".")[2]) for n in found} == set(layers or [0, 1])


@pytest.mark.fault(
    "layer 1 also selects layers 10 to 19",
    "names are compared part by part",
)
def test_layer_1_is_not_layer_10() -> None:
    model = lora(sizes={"num_layers": 12}, target_modules=["layers.1.mlp.linear_fc1"])
    assert list(sites(model)) == ["decoder.layers.1.mlp.linear_fc1"]
    model.add_adapter(LoRA("wild", dim=2, target_modules=["*.layers.1.*"]))
    assert {n.split(".")[2] for n in sites(model, "wild")} == {"1"}
    model.add_adapter(CanonicalAdapter(dim=2, layers=[1]))
    assert {n.split(".")[2] for n in sites(model, "canonical_adapter")} == {"1"}


def test_rank_and_alpha_patterns_take_the_first_match() -> None:
    model = lora(
        alpha=8,
        rank_pattern={"layers.0.mlp.linear_fc1": 2, "linear_fc1": 6},
        alpha_pattern={"mlp.linear_fc1": 3, "linear_proj": 1},
    )
    found = {n.removeprefix("decoder.layers."): (a.low_rank.dim, a.low_rank.scale) for n, a in sites(model).items()}
    assert found["0.mlp.linear_fc1"] == (2, 3 / 2)
    assert found["1.mlp.linear_fc1"] == (6, 3 / 6)
    assert found["1.self_attention.linear_proj"] == (4, 1 / 4)
    assert found["1.mlp.linear_fc2"] == (4, 8 / 4)
    assert sites(model)["decoder.layers.1.mlp.linear_fc1"].lora_A.shape == (6, 32)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    model = lora(alpha=8, use_rslora=True, rank_pattern={"linear_fc2": 16})
    for name, adapter in sites(model).items():
        assert adapter.low_rank.scale == (8 / 4 if "fc2" in name else 8 / 2)
    shake(model)
    layer = model.module.decoder.layers[0].mlp.linear_fc2
    x = torch.randn(3, 1, 48)
    adapter = layer.adapters["lora"]
    wanted = F.linear(x, layer.weight) + 2 * x @ adapter.lora_A.T @ adapter.lora_B.T
    assert torch.allclose(layer(x)[0], wanted, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in INITIALIZERS if m != "zero"])
def test_initial_values_have_the_documented_spread(method: str) -> None:
    model = lora(sizes={"hidden_size": 256, "ffn_hidden_size": 384}, dim=64, lora_A_init_method=method)
    a = sites(model)["decoder.layers.0.mlp.linear_fc1"].lora_A
    std = {"xavier": (2 / 320) ** 0.5, "xavier_normal": (2 / 320) ** 0.5, "kaiming": (3 * 256) ** -0.5, "normal": 0.02}
    assert a.shape == (64, 256) and float(a.detach().std()) == pytest.approx(std[method], rel=0.03)


def test_initial_values_depend_on_seed_name_and_site_only() -> None:
    first, again = lora(), lora(layers=[1])
    there = "decoder.layers.1.mlp.linear_fc1"
    assert torch.equal(sites(first)[there].lora_A, sites(again)[there].lora_A)
    other_site = sites(first)["decoder.layers.0.mlp.linear_fc1"].lora_A
    other_name = lora(name="second")
    other_seed = make(seed=5)
    other_seed.add_adapter(LoRA(dim=4))
    for other in (other_site, sites(other_name, "second")[there].lora_A, sites(other_seed)[there].lora_A):
        assert not torch.equal(sites(first)[there].lora_A, other)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_acts_in_training_only(position: str) -> None:
    model, still = lora(dropout=0.5, dropout_position=position), lora()
    shake(model)
    still.load_state_dict(model.state_dict())
    model.eval(), still.eval()
    assert torch.equal(model(tokens()), still(tokens()))
    model.train()
    assert not torch.equal(model(tokens()), model(tokens()))
    torch.manual_seed(0)
    first = model(tokens())
    torch.manual_seed(0)
    assert torch.equal(model(tokens()), first)


def test_dropout_stands_before_a_or_after_b() -> None:
    x = torch.randn(4, 1, 48)
    for position in ("pre", "post"):
        model = lora(dropout=0.5, dropout_position=position, target_modules=["linear_fc2"])
        shake(model)
        model.train()
        linear = model.module.decoder.layers[0].mlp.linear_fc2
        a = linear.adapters["lora"]
        torch.manual_seed(1)
        found = linear(x)[0] - linear.base(x)[0]
        torch.manual_seed(1)
        if position == "pre":
            wanted = 8 * F.dropout(x, 0.5) @ a.lora_A.T @ a.lora_B.T
        else:
            wanted = F.dropout(8 * x @ a.lora_A.T @ a.lora_B.T, 0.5)
        assert torch.allclose(found, wanted, atol=1e-4)


def test_lora_plus_gives_b_its_own_learning_rate() -> None:
    model = lora(lr_ratio_B=16.0)
    model.add_adapter(CanonicalAdapter(dim=4))
    groups = AdamW().parameter_groups(model)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = CanonicalAdapter.default_lr if "canonical" in name else LoRA.default_lr
            assert rates[id(parameter)] == pytest.approx(wanted * (16 if name.endswith("lora_B") else 1)), name
    assert {id(p) for g in AdamW(lr=1.0).parameter_groups(model) for p in g["params"]} == set(rates)
    chosen = {g["lr"] for g in AdamW(lr=0.5).parameter_groups(model)}
    assert chosen == {0.5, 8.0}


@every_family
@pytest.mark.parametrize("target", ["word_embeddings", "output_layer"])
def test_embedding_and_output_layer(family: str, target: str) -> None:
    """Equal to a change of the dense matrix, which is another one for each end also when the base ties them."""
    model = make(family)
    with torch.no_grad():
        base = model(tokens())
    model.add_adapter(LoRA(dim=4, target_modules=[target]))
    with torch.no_grad():
        assert torch.equal(model(tokens()), base)
        shake(model)
        found = model(tokens())
        assert torch.allclose(found, by_dense_matrix(model, target), rtol=1e-4, atol=2e-5)
    assert (found - base).abs().max() > 1e-2
    loss(model).backward()
    for adapter in model.stack.adapters():
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())


def by_dense_matrix(model: GPT, target: str) -> Tensor:
    """Return logits with the update added to one dense matrix by hooks, without any adapter."""
    (adapter,) = model.stack.adapters("lora")
    a, b = adapter.lora_A, adapter.lora_B
    with model.adapters_disabled():
        if target == "word_embeddings":
            module = model.module.embedding.word_embeddings.base
            change = 8 * a @ b.T

            def hook(_: Any, args: Any, output: Tensor) -> Tensor:
                return output + change[args[0]]
        else:
            module, change = model.module.output_layer.base, 8 * b @ a

            def hook(_: Any, args: Any, output: Any) -> Any:
                return output[0] + args[0] @ change.T, output[1]

        handle = module.register_forward_hook(hook)
        try:
            return model(tokens())
        finally:
            handle.remove()


@pytest.mark.fault(
    "an adapter of a tied output layer is merged into the embedding too",
    "merging it is refused",
)
def test_a_tied_output_layer_cannot_be_merged() -> None:
    model = make("llama_tied")
    model.add_adapter(LoRA(dim=4, target_modules=["output_layer"]))
    with pytest.raises(ValueError, match="LoRA 'lora' cannot be merged at output_layer: its weight is tied"):
        model.merge_adapters()


def test_an_untied_output_layer_merges() -> None:
    model = make("llama")
    model.add_adapter(LoRA(dim=4, target_modules=["output_layer"]))
    shake(model, 0.1)
    live = model(tokens())
    model.merge_adapters()
    assert torch.allclose(model(tokens()), live, rtol=1e-5, atol=1e-5)


def test_default_learning_rates_differ_by_method() -> None:
    rates = {m.__name__: m.default_lr for m in PEFT.__subclasses__()}
    assert rates["IA3"] > rates["CanonicalAdapter"] > rates["LoRA"]


MIXTURE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
METHODS_THAT_SHARE = [LoRA, CanonicalLoRA]


def mixture(method: type[LoRA], **options: Any) -> GPT:
    model = make(sizes=MIXTURE)
    model.add_adapter(method(dim=4, **options))
    return model


@pytest.mark.parametrize("method", METHODS_THAT_SHARE)
def test_experts_share_one_pair_a_layer_or_have_one_each(method: type[LoRA]) -> None:
    """Equal to four pairs of the same values, whose gradients are summed; nothing is averaged."""
    shared, each = mixture(method, share_experts=True), mixture(method)
    name = method.short_name()
    assert type(shared.stack.transforms[name].hyperparameters()["share_experts"]) is bool
    shake(shared)
    values = dict(adapter_values(shared, name))
    held = {key for key in values if ".mlp.experts." in key}
    assert held and not any(".local_experts." in key for key in held)
    for site, adapter in sites(each, name).items():
        experts, _, leaf = site.rpartition(".")
        beside = f"{experts.partition('.local_experts.')[0]}."
        for key, parameter in adapter.named_parameters():
            prefix = f"{leaf}_" if key in ("lora_A", "lora_B") and ".experts." in site else ""
            parameter.data.copy_(values[f"{beside}{prefix}{key}" if ".experts." in site else f"{site}.{key}"])
    assert torch.allclose(shared(tokens()), each(tokens()), rtol=1e-5, atol=1e-5)
    for model in (shared, each):
        loss(model).backward()
    summed: dict[str, Any] = {}
    for site, adapter in sites(each, name).items():
        for key, parameter in adapter.named_parameters():
            place = f"{site}.{key}"
            if ".local_experts." in site:
                head, _, tail = site.partition(".local_experts.")
                leaf = tail.partition(".")[2]
                place = f"{head}.{leaf}_{key}" if key in ("lora_A", "lora_B") else f"{head}.{key}"
            summed[place] = summed.get(place, 0) + (0 if parameter.grad is None else parameter.grad)
    assert summed.keys() == values.keys()
    for key, parameter in adapter_values(shared, name):
        assert torch.allclose(parameter.grad, summed[key], rtol=1e-4, atol=1e-6), key


def adapter_values(model: GPT, name: str) -> list[tuple[str, Tensor]]:
    return [(f"{t.site}.{t.name}", t.parameter) for t in model.stack.tensors(name)]


@pytest.mark.parametrize("method", METHODS_THAT_SHARE)
def test_shared_factors_are_saved_once_merge_and_are_deleted(method: type[LoRA], tmp_path: Path) -> None:
    model, twin = mixture(method, share_experts=True), make(sizes=MIXTURE)
    with torch.no_grad():
        base = twin(tokens())
        assert torch.equal(model(tokens()), base), "the identity at birth"
        shake(model, 0.1)
        live = model(tokens())
        model.save_adapters(tmp_path / "adapter")
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert len([key for key in stored if ".experts." in key]) == 2 * 2 * (3 if method is CanonicalLoRA else 2)
        assert '"share_experts": true' in (tmp_path / "adapter" / "adapter_config.json").read_text()
        twin.load_adapters(tmp_path / "adapter")
        assert torch.equal(twin(tokens()), live)
        model.merge_adapters()
        assert torch.allclose(model(tokens()), live, rtol=1e-4, atol=1e-5)
        model.unmerge_adapters()
        assert torch.equal(model(tokens()), live)
        with model.adapters_disabled():
            assert torch.equal(model(tokens()), base)
        for changed in (model, twin):
            changed.delete_adapter(method.short_name())
            assert torch.equal(changed(tokens()), base)


def test_the_report_says_which_experts_share() -> None:
    shared, each = (mixture(LoRA, share_experts=s) for s in (True, False))
    found = [{r.site for r in report.sites(m.stack) if ".experts" in r.site} for m in (shared, each)]
    assert found[0] == {f"decoder.layers.{i}.mlp.experts" for i in range(2)}
    assert len(found[1]) == 2 * 4 * 2 and all(".local_experts." in site for site in found[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["linear_qkv", "layers.0.mlp.experts.local_experts.1.linear_fc1"]},
            r"share_experts=True gives all experts of a layer one update, but the targets leave out "
            r"decoder.layers.0.mlp.experts.local_experts.0.linear_fc1; name the linear of every expert",
        ),
        ({"target_modules": ["linear_qkv"]}, "share_experts=True, but no target is a linear of an expert; leave it"),
        ({"rank_pattern": {"local_experts.1.linear_fc1": 2}}, "rank_pattern .* matches no site"),
    ],
)
def test_experts_cannot_share_what_only_some_of_them_have(options: dict[str, Any], message: str) -> None:
    model = make(sizes=MIXTURE)
    with pytest.raises((ConfigError, MatchError), match=message):
        model.add_adapter(LoRA(dim=4, share_experts=True, **options))
    assert not model.adapters
    model.add_adapter(LoRA(dim=4, share_experts=True, rank_pattern={"experts.linear_fc1": 2}))
    ranks = {n: p.shape[0] for n, p in model.named_parameters() if n.endswith("lora_A")}
    assert {r for n, r in ranks.items() if "linear_fc1_lora_A" in n} == {2}


def test_experts_share_nothing_in_a_dense_model() -> None:
    with pytest.raises(ConfigError, match="no target is a linear of an expert"):
        make().add_adapter(LoRA(dim=4, share_experts=True))
    with pytest.raises(ConfigError, match="share_experts must be True or False, got 'yes'"):
        LoRA(share_experts="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [LoRA, DoRA, CanonicalLoRA])
def test_layers_of_named_parts(method: type[LoRA], tmp_path: Path) -> None:
    transform = method(dim=4, layers={"decoder": [1]})
    assert "layers={'decoder': [1]}" in repr(transform)
    model = make()
    model.add_adapter(transform)
    assert {n.split(".")[2] for n in sites(model, transform.name)} == {"1"}
    model.save_adapters(tmp_path / "adapter")
    twin = make()
    twin.load_adapters(tmp_path / "adapter")
    assert repr(twin.stack.transforms[transform.name]) == repr(transform)


@pytest.mark.parametrize(
    "layers", ["0", 3, {"decoder": 3}, {"decoder": [0.5]}, {1: [0]}, {}, [True], [None], (0,), {"decoder": None}]
)
def test_layers_that_are_none_are_refused(layers: Any) -> None:
    for method in (LoRA, IA3, CanonicalAdapter):
        with pytest.raises(ConfigError, match="layers must be a list of whole numbers, or one for each part") as caught:
            method(layers=layers)
        assert "\n" not in str(caught.value)
