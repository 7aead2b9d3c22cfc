"""CanonicalLoRA: equal to Hugging Face PEFT's LoRA of separate linears; subsets, names, sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graftwork.errors import MatchError
from graftwork.models import GPT, shapes
from graftwork.parallel.fused import GatedRows, KVRows, Parts, QKVRows
from graftwork.peft import CanonicalLoRA, report
from tests.contracts.methods import make, shake, tokens
from tests.peft import hf_lora
from tests.peft.hf_lora import assert_close

FAMILIES = ["llama", "llama_tied", "llama_bias", "llama_wide_heads", "qwen3"]
OURS = {
    "q_proj": "linear_q_",
    "k_proj": "linear_k_",
    "v_proj": "linear_v_",
    "gate_proj": "linear_fc1_gate_",
    "up_proj": "linear_fc1_up_",
    "o_proj": "",
    "down_proj": "",
}


def matched(ours: GPT, theirs: nn.Module) -> list[tuple[Any, Any]]:
    """Copy our factors into theirs; return (our parameter, theirs) of every factor."""
    names = {id(module): name.rpartition(".")[2] for name, module in theirs.named_modules()}
    found = []
    for adapter, layer, _ in hf_lora.pairs(ours, theirs, "canonical_lora"):
        prefix = OURS[names[id(layer)]]
        for factor, side in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            mine, other = adapter.get_parameter(f"{prefix}{factor}"), side["default"].weight
            with torch.no_grad():
                other.copy_(mine)
            found.append((mine, other))
    return found


def compare(ours: GPT, theirs: nn.Module) -> None:
    both = matched(ours, theirs)
    assert (
        len(both)
        == sum(p.requires_grad for p in ours.parameters())
        == sum(p.requires_grad for p in theirs.parameters())
    )
    found, wanted = ours(hf_lora.tokens()), theirs(hf_lora.tokens()).logits
    assert_close(found, wanted, "logits")
    hf_lora.loss(found).backward()
    hf_lora.loss(wanted).backward()
    for mine, other in both:
        assert_close(mine.grad, other.grad, "gradient")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_hugging_face_peft_s(family: str, tmp_path: Path) -> None:
    compare(*hf_lora.both(family, tmp_path / "hf", CanonicalLoRA(dim=4, alpha=8)))


@pytest.mark.parametrize("chosen", [["q", "v"], ["k"], ["gate"], ["up", "q"], ["v", "down"]])
def test_any_subset_equals_hugging_face_peft_s(chosen: list[str], tmp_path: Path) -> None:
    names = {"gate": "linear_fc1_gate", "up": "linear_fc1_up", "down": "linear_fc2"}
    targets = [names.get(name, f"linear_{name}") for name in chosen]
    transform = CanonicalLoRA(dim=4, alpha=8, target_modules=targets, use_rslora=True)
    theirs = {"target_modules": [f"{name}_proj" for name in chosen], "use_rslora": True}
    compare(*hf_lora.both("llama", tmp_path / "hf", transform, **theirs))


def test_ranks_and_alphas_are_of_each_linear() -> None:
    model = make()
    model.add_adapter(CanonicalLoRA(dim=4, rank_pattern={"linear_q": 2, "layers.1.mlp.linear_fc1_up": 3}))
    sizes = {f"{r.site}.{k}": v for r in report.sites(model.stack) for k, v in r.shapes.items()}
    layer = "decoder.layers.{}.self_attention.linear_qkv.linear_{}_lora_A"
    assert sizes[layer.format(0, "q")] == (2, 32) and sizes[layer.format(1, "v")] == (4, 32)
    assert sizes["decoder.layers.1.mlp.linear_fc1.linear_fc1_up_lora_A"] == (3, 32)
    assert sizes["decoder.layers.0.mlp.linear_fc1.linear_fc1_up_lora_A"] == (4, 32)
    shake(model, 0.05)
    with torch.no_grad():
        live = model(tokens())
        model.merge_adapters()
        assert_close(model(tokens()), live, "merged")


def test_a_plain_mlp_has_no_gate() -> None:
    model = make("gpt2")
    model.add_adapter(CanonicalLoRA(dim=4))
    assert {r.site.rpartition(".")[2] for r in report.sites(model.stack)} == {
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    }
    with pytest.raises(MatchError, match="'linear_fc1_gate' matches no module; did you mean 'linear_fc1_up'"):
        model.add_adapter(CanonicalLoRA("second", target_modules=["linear_fc1_gate"]))


@pytest.mark.parametrize("fused", ["linear_qkv", "linear_fc1"])
def test_a_fused_linear_is_not_its_target(fused: str) -> None:
    with pytest.raises(MatchError, match=f"'{fused}' matches no module; did you mean"):
        make().add_adapter(CanonicalLoRA(target_modules=[fused]))


def test_patterns_name_linears_as_they_were() -> None:
    model = make()
    model.add_adapter(CanonicalLoRA(dim=2, target_modules=["*.layers.1.*.linear_q", "layers.0.mlp.linear_fc1_up"]))
    found = [f"{r.site}.{k}" for r in report.sites(model.stack) for k in r.shapes if k.endswith("_B")]
    assert found == [
        "decoder.layers.0.mlp.linear_fc1.linear_fc1_up_lora_B",
        "decoder.layers.1.self_attention.linear_qkv.linear_q_lora_B",
    ]


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_acts_in_training_only(position: str) -> None:
    model = make(sizes={"num_layers": 1})
    model.add_adapter(CanonicalLoRA(dim=4, dropout=0.5, dropout_position=position))
    shake(model)
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))
    model.train()
    assert not torch.equal(model(tokens()), model(tokens()))


@pytest.mark.parametrize(("rank", "count"), [(1, 4_718_592), (8, 37_748_736)])
def test_gpt3_175b_trains_as_many_parameters_as_the_paper_says(rank: int, count: int) -> None:
    """Table 4 of arXiv 2106.09685: 4.7 M and 37.7 M on the queries and values of all layers; no memory is needed."""
    model = GPT(shapes.gpt3_175b(), dtype="bf16")
    with torch.device("meta"):
        model.module = model.build()[0]
    model.add_adapter(CanonicalLoRA(dim=rank, target_modules=["linear_q", "linear_v"]))
    assert sum(site.parameters for site in report.sites(model.stack)) == count


@pytest.mark.parametrize("dim", [0, -1, 1])
def test_parts_lie_where_the_row_layouts_put_them(dim: int) -> None:
    """Against the layouts that the weights' mappings use."""
    layouts: list[tuple[Parts, Any]] = [
        (Parts(("q", "k", "v"), (3, 1, 1), 4), QKVRows(6, 2, 4).join),
        (Parts(("k", "v"), (1, 1), 4), KVRows(3, 4).join),
        (Parts(("gate", "up"), (1, 1)), GatedRows.join),
    ]
    for parts, join in layouts:
        counts = parts.rows(40 if "q" in parts.names else 24)
        changes = {name: torch.randn(count, 7) for name, count in counts.items()}
        fused = torch.randn(sum(counts.values()), 7)
        turned = dim if dim >= 0 else 1
        wanted = (fused + join(*changes.values())).transpose(0, turned)
        found = parts.add(fused.transpose(0, turned), {n: c.transpose(0, turned) for n, c in changes.items()}, dim)
        assert torch.allclose(found, wanted)
        for name in parts.names:
            alone = parts.add(fused.transpose(0, turned), {name: changes[name].transpose(0, turned)}, dim)
            others = {n: c if n == name else torch.zeros_like(c) for n, c in changes.items()}
            assert torch.allclose(alone, (fused + join(*others.values())).transpose(0, turned))


def test_the_update_of_one_linear_leaves_the_rows_of_others_alone() -> None:
    model = make(sizes={"num_layers": 1})
    model.add_adapter(CanonicalLoRA(dim=4, target_modules=["linear_v"]))
    shake(model)
    linear = model.module.decoder.layers[0].self_attention.linear_qkv
    x = torch.randn(3, 1, 32)
    adapter, base = linear.adapters["canonical_lora"], linear.base
    change = (linear(x)[0] - base(x)[0]).view(3, 1, 2, 4, 8)
    normed = F.rms_norm(x, (32,), base.layer_norm_weight, base.eps)
    update = 8 * normed @ adapter.linear_v_lora_A.T @ adapter.linear_v_lora_B.T
    assert torch.equal(change[..., :3, :], torch.zeros(3, 1, 2, 3, 8))
    assert torch.allclose(change[..., 3, :], update.view(3, 1, 2, 8), atol=1e-4)
