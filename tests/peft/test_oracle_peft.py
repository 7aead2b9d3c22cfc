"""LoRA and IA3 against Hugging Face PEFT on transformers: same tensors, same logits, same gradients."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from graftwork import models
from graftwork.models import GPT
from graftwork.peft import IA3, LoRA
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import make_tiny, oracle
from tests.peft.hf_lora import LINEARS, assert_close, loss, tokens
from tests.peft.hf_names import modules, qkv_rows

FAMILIES = ["llama", "llama_tied", "llama_bias", "llama_wide_heads", "gpt2", "gpt2_untied"]


def pair(family: str, directory: Path, transform: Any, config: peft.PeftConfig) -> tuple[GPT, nn.Module]:
    """Return (our model with a shaken adapter, theirs with a fresh one) on the same random checkpoint."""
    make_tiny(family, directory)
    ours = models.load(directory)
    ours.add_adapter(transform)
    shake(ours, 0.05)
    return ours, peft.get_peft_model(oracle(directory), config).eval()


def compare(ours: GPT, theirs: nn.Module) -> None:
    """Compare logits and run both backward passes."""
    found, wanted = ours(tokens()), theirs(tokens()).logits
    assert_close(found, wanted, "logits")
    loss(found).backward()
    loss(wanted).backward()


def lora_config(family: str, **options: Any) -> peft.LoraConfig:
    gpt2 = family.startswith("gpt2")
    targets = options.pop("target_modules", LINEARS["gpt2" if gpt2 else "llama"])
    return peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, fan_in_fan_out=gpt2, **options)


def lora_pairs(ours: GPT, theirs: nn.Module) -> list[tuple[Any, list[tuple[Any, Tensor]]]]:
    """Return (our adapter, [(their LoRA layer, its rows of our B), ...]) for every site."""
    base = theirs.base_model.model
    return [
        (g.adapter, [(base.get_submodule(path), rows) for path, rows in modules(ours.shape, g.site.name)])
        for g in ours.stack.grafted["lora"]
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_lora(family: str, rslora: bool, tmp_path: Path) -> None:
    transform = LoRA(dim=4, alpha=8, use_rslora=rslora)
    ours, theirs = pair(family, tmp_path / "hf", transform, lora_config(family, use_rslora=rslora))
    pairs = lora_pairs(ours, theirs)
    with torch.no_grad():
        for adapter, parts in pairs:
            for layer, rows in parts:
                layer.lora_A["default"].weight.copy_(adapter.lora_A)
                layer.lora_B["default"].weight.copy_(adapter.lora_B[rows])
    assert sum(p.requires_grad for p in theirs.parameters()) == 2 * sum(len(parts) for _, parts in pairs)
    compare(ours, theirs)
    for adapter, parts in pairs:
        shared = sum(layer.lora_A["default"].weight.grad for layer, _ in parts)
        assert_close(adapter.lora_A.grad, shared, "gradient of A")
        for layer, rows in parts:
            assert_close(adapter.lora_B.grad[rows], layer.lora_B["default"].weight.grad, "gradient of B")


def test_lora_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    ranks, alphas = {"layers.1.mlp.linear_fc2": 2}, {"layers.2.mlp.linear_fc2": 3, "linear_proj": 5}
    transform = LoRA(
        dim=4, alpha=8, target_modules=["linear_fc2", "linear_proj"], rank_pattern=ranks, alpha_pattern=alphas
    )
    config = lora_config(
        "llama",
        target_modules=["down_proj", "o_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"layers.2.mlp.down_proj": 3, "o_proj": 5},
    )
    ours, theirs = pair("llama", tmp_path / "hf", transform, config)
    with torch.no_grad():
        for adapter, ((layer, _),) in lora_pairs(ours, theirs):
            layer.lora_A["default"].weight.copy_(adapter.lora_A)
            layer.lora_B["default"].weight.copy_(adapter.lora_B)
    compare(ours, theirs)


def test_lora_of_embedding_and_output_layer(tmp_path: Path) -> None:
    transform = LoRA(dim=4, alpha=8, target_modules=["word_embeddings", "output_layer"])
    config = lora_config("llama", target_modules=["embed_tokens", "lm_head"])
    ours, theirs = pair("llama", tmp_path / "hf", transform, config)
    embedding, output = ours.stack.adapters("lora")
    words, head = theirs.base_model.model.model.embed_tokens, theirs.base_model.model.lm_head
    with torch.no_grad():
        words.lora_embedding_A["default"].copy_(embedding.lora_A.T)
        words.lora_embedding_B["default"].copy_(embedding.lora_B)
        head.lora_A["default"].weight.copy_(output.lora_A)
        head.lora_B["default"].weight.copy_(output.lora_B)
    compare(ours, theirs)
    assert_close(embedding.lora_A.grad.T, words.lora_embedding_A["default"].grad, "gradient of the looked-up factor")
    assert_close(embedding.lora_B.grad, words.lora_embedding_B["default"].grad, "gradient of the other factor")
    assert_close(output.lora_A.grad, head.lora_A["default"].weight.grad, "gradient of A")
    assert_close(output.lora_B.grad, head.lora_B["default"].weight.grad, "gradient of B")


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2", "qwen3"])
def test_ia3(family: str, tmp_path: Path) -> None:
    """Exact under grouped queries; qwen3 normalises keys, where only ``pre_norm`` is PEFT's place."""
    gpt2 = family.startswith("gpt2")
    targets = ["c_attn", "mlp.c_proj"] if gpt2 else ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=targets[-1:], fan_in_fan_out=gpt2)
    transform = IA3(key_position="pre_norm" if family == "qwen3" else None)
    ours, theirs = pair(family, tmp_path / "hf", transform, config)
    vectors = [ia3_vectors(g.adapter, g.site.name, ours, theirs) for g in ours.stack.grafted["ia3"]]
    with torch.no_grad():
        for parts in vectors:
            for parameter, layer, rows in parts:
                layer.ia3_l["default"].view(-1)[rows] = parameter
    compare(ours, theirs)
    for parts in vectors:
        for parameter, layer, rows in parts:
            assert_close(parameter.grad, layer.ia3_l["default"].grad.view(-1)[rows], "gradient")


def ia3_vectors(adapter: Any, name: str, ours: GPT, theirs: nn.Module) -> list[tuple[Tensor, Any, Tensor]]:
    """Return (our vector, their layer, its elements of their vector) of one site."""
    found = dict(modules(ours.shape, name))
    base = theirs.base_model.model
    if name.endswith("linear_fc2"):
        (path,) = found
        return [(adapter.scale_ffn, base.get_submodule(path), torch.arange(ours.shape.ffn_hidden_size))]
    width = len(qkv_rows(ours.shape)[1])
    places = []
    for index, vector in ((1, adapter.scale_k), (2, adapter.scale_v)):
        fused = len(found) == 1
        path = next(iter(found)) if fused else list(found)[index]
        places.append((vector, base.get_submodule(path), torch.arange(width) + (index * width if fused else 0)))
    return places


def test_ia3_after_the_norm_of_keys(tmp_path: Path) -> None:
    """The default where keys are normalised: against a hook behind transformers' k_norm."""
    directory = make_tiny("qwen3", tmp_path / "hf")
    ours, theirs = models.load(directory), oracle(directory)
    ours.add_adapter(IA3(targets=["k"]))
    shake(ours)
    scales = []
    for item in ours.stack.grafted["ia3"]:
        layer = theirs.model.layers[item.site.layer].self_attn
        scale = item.adapter.scale_k.detach().clone().requires_grad_()
        scales.append((item.adapter.scale_k, scale))
        layer.k_norm.register_forward_hook(lambda m, a, out, s=scale: out * s.view(-1, out.shape[-1]))
    theirs.requires_grad_(False)
    compare(ours, theirs)
    for our, their in scales:
        assert_close(our.grad, their.grad, "gradient")


@pytest.mark.fault(
    "rows of q, k and v stand one after another in an exported adapter, not by groups",
    "adapters are compared with PEFT's logits, where the wrong order is noticed",
)
def test_the_comparison_notices_a_wrong_layout(tmp_path: Path) -> None:
    """Rows of q, k and v one after another, not by groups: the mistake of other libraries must be visible."""
    ours, theirs = pair("llama", tmp_path / "hf", LoRA(dim=4, alpha=8), lora_config("llama"))
    with torch.no_grad():
        for adapter, parts in lora_pairs(ours, theirs):
            start = 0
            for layer, rows in parts:
                layer.lora_A["default"].weight.copy_(adapter.lora_A)
                layer.lora_B["default"].weight.copy_(adapter.lora_B[start : start + len(rows)])
                start += len(rows)
    with pytest.raises(AssertionError, match="logits"):
        compare(ours, theirs)
