"""P-tuning against ``inputs_embeds`` and canonical adapters against hooks on transformers: logits and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork import models
from graftwork.models import GPT
from graftwork.peft import CanonicalAdapter, PTuning
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import ODD_VOCABULARY, make_tiny, oracle

TOLERANCE = 1e-5
every_family = pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "nemotron", "qwen3"])


def tokens() -> Tensor:
    return torch.randint(ODD_VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(5))


def loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, -15:-1].flatten(0, 1), tokens()[:, 1:].flatten())


def assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    found, wanted = found.detach(), wanted.detach()
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), what


def leaves(adapter: nn.Module) -> dict[str, Tensor]:
    """Return copies of an adapter's parameters that collect their own gradients."""
    return {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}


def pair(family: str, directory: Path, transform: Any) -> tuple[GPT, nn.Module]:
    make_tiny(family, directory)
    ours, theirs = models.load(directory), oracle(directory)
    ours.add_adapter(transform)
    shake(ours, 0.2)
    return ours, theirs.requires_grad_(False)


def assert_gradients(ours: GPT, copies: list[dict[str, Tensor]]) -> None:
    for adapter, copy in zip(ours.stack.adapters(), copies, strict=True):
        for name, parameter in adapter.named_parameters():
            assert_close(parameter.grad, copy[name].grad, f"gradient of {name}")


@every_family
def test_p_tuning(family: str, tmp_path: Path) -> None:
    transform = PTuning(virtual_tokens=4, embedding_dim=12, bottleneck_dim=20, init_std=0.3)
    ours, theirs = pair(family, tmp_path / "hf", transform)
    (adapter,) = ours.stack.adapters()
    copy = leaves(adapter)
    hidden = F.gelu(copy["slots"] @ copy["linear_in"].T + copy["bias_in"])
    table = hidden @ copy["linear_out"].T + copy["bias_out"]
    words = theirs.get_input_embeddings()(tokens())
    virtual = torch.tensor(ours.prompt_layout.ids("ptuning")).expand(2, -1)

    found = ours(torch.cat([virtual, tokens()], dim=1))
    wanted = theirs(inputs_embeds=torch.cat([table.expand(2, -1, -1), words], dim=1)).logits
    assert_close(found, wanted, "logits")
    loss(found).backward()
    loss(wanted).backward()
    assert_gradients(ours, [copy])

    found = ours(torch.cat([tokens()[:, :1], virtual, tokens()[:, 1:]], dim=1))
    placed = torch.cat([words[:, :1], table.expand(2, -1, -1), words[:, 1:]], dim=1)
    assert_close(found, theirs(inputs_embeds=placed).logits, "logits with the prompt after the first token")


@every_family
@pytest.mark.parametrize("options", [{}, {"norm_position": "post", "activation": "gelu", "layers": [0, 3]}])
def test_canonical_adapter(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(family, tmp_path / "hf", CanonicalAdapter(dim=6, **options))
    copies = []
    for item in ours.stack.grafted["canonical_adapter"]:
        copies.append(leaves(item.adapter))
        hook_in(theirs, family, item.site, copies[-1], options)
    assert len(copies) == (4 if options else 8)
    found, wanted = ours(tokens()), theirs(tokens()).logits
    assert_close(found, wanted, "logits")
    loss(found).backward()
    loss(wanted).backward()
    assert_gradients(ours, copies)


def hook_in(
    theirs: nn.Module,
    family: str,
    site: Any,
    copy: dict[str, Tensor],
    options: dict[str, Any],
    before_bias: bool = True,
) -> None:
    """Adapt the output of one sub-layer of transformers' model; it reads h before the linear's bias is added."""
    layer = (theirs.transformer.h if family == "gpt2" else theirs.model.layers)[site.layer]
    attention = site.leaf == "self_attention"
    module = (
        (layer.attn if attention else layer.mlp) if family == "gpt2" else layer.self_attn if attention else layer.mlp
    )
    bias = module.c_proj.bias if family == "gpt2" and before_bias else 0.0
    activation = F.gelu if options else F.silu

    def normed(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], copy["norm_weight"], copy["norm_bias"], 1e-5)

    def bottleneck(h: Tensor) -> Tensor:
        if options:
            return normed(activation(h @ copy["linear_in"].T) @ copy["linear_out"].T)
        return activation(normed(h) @ copy["linear_in"].T) @ copy["linear_out"].T

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        changed = h + bottleneck(h - bias)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    module.register_forward_hook(hook)


def test_the_comparison_notices_an_adapter_behind_the_bias(tmp_path: Path) -> None:
    """transformers adds the bias inside the sub-layer: an adapter that read it there would be another function."""
    ours, theirs = pair("gpt2", tmp_path / "hf", CanonicalAdapter(dim=6))
    for item in ours.stack.grafted["canonical_adapter"]:
        hook_in(theirs, "gpt2", item.site, leaves(item.adapter), {}, before_bias=False)
    with pytest.raises(AssertionError, match="logits"):
        assert_close(ours(tokens()), theirs(tokens()).logits, "logits")
