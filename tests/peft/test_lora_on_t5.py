"""LoRA, DoRA and CanonicalLoRA on an encoder-decoder, cross attention included, against Hugging Face PEFT."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork import models
from graftwork.errors import MatchError
from graftwork.models import T5
from graftwork.peft import CanonicalLoRA, DoRA, LoRA
from tests.contracts.methods import shake
from tests.helpers.tiny_t5 import ids, make_t5, masks, oracle, tiny
from tests.peft import hf_lora
from tests.peft.hf_names import qkv_rows

HEADS, WIDTH = 4, 16
close = partial(hf_lora.assert_close, tolerance=5e-5)
"""That of the base's logits: queries and keys are not scaled, which makes roundings grow."""
EVERYTHING = ["linear_qkv", "linear_q", "linear_kv", "linear_proj", "linear_fc1", "linear_fc2"]
PREFIXES = {"q": "linear_q_", "k": "linear_k_", "v": "linear_v_", "wi_0": "linear_fc1_gate_", "wi_1": "linear_fc1_up_"}
THEIRS = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]


def parts(model: T5, site: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (their module, its rows of our linear), written from the formats alone."""
    decoder, outputs = site.part == "decoder", site.module.weight.shape[0]
    block, inside, leaf = f"{site.part}.block.{site.layer}.layer", site.inside.partition(".")[0], site.leaf
    where = {
        "self_attention": f"{block}.0.SelfAttention",
        "cross_attention": f"{block}.1.EncDecAttention",
        "mlp": f"{block}.{2 if decoder else 1}.DenseReluDense",
    }[inside]
    every, heads = torch.arange(outputs), torch.arange(2 * HEADS * WIDTH).view(HEADS, 2, WIDTH)
    fused = {
        "linear_qkv": dict(zip("qkv", qkv_rows(model.shape))),
        "linear_kv": {"k": heads[:, 0].flatten(), "v": heads[:, 1].flatten()},
        "linear_fc1": {"wi_0": every[: outputs // 2], "wi_1": every[outputs // 2 :]},
    }
    plain = {"linear_q": "q", "linear_proj": "o", "linear_fc1": "wi", "linear_fc2": "wo"}
    split = leaf in fused and (leaf != "linear_fc1" or model.config.gated_linear_unit)
    for name, rows in (fused[leaf] if split else {plain[leaf]: every}).items():
        yield f"{where}.{name}", rows


def compare(kind: str, directory: Path, transform: LoRA, **options: Any) -> int:
    """Compare logits and gradients; return the number of their layers."""
    ours, theirs = models.load(make_t5(kind, directory)), oracle(directory)
    ours.add_adapter(transform)
    shake(ours, 0.05)
    wi = ["wi"] if kind == "t5" else ["wi_0", "wi_1"]
    config = peft.LoraConfig(target_modules=["q", "k", "v", "o", *wi, "wo"], r=4, lora_alpha=8, **options)
    theirs = peft.get_peft_model(theirs, config).eval()
    (source, target), (source_mask, target_mask) = ids(), masks()
    asked = {"input_ids": source, "attention_mask": source_mask}
    checks = [check for item in ours.stack.grafted[transform.name] for check in _copied(ours, theirs, item)]
    found = ours(source, target, source_mask, target_mask)
    wanted = theirs(**asked, decoder_input_ids=target, decoder_attention_mask=target_mask).logits
    mask = target_mask.bool()
    close(found[mask], wanted[mask], "logits")
    for logits in (found, wanted):
        F.cross_entropy(logits[mask], target[mask].roll(-1)).backward()
    for mine, rows, parameters, what in checks:
        gradient = sum(p.grad for p in parameters)
        close(mine.grad if rows is None else mine.grad[rows], gradient, f"gradient of {what}")
    return len(checks)


def _copied(ours: T5, theirs: nn.Module, item: Any) -> Iterator[tuple[nn.Parameter, Tensor | None, list[Any], str]]:
    """Copy our values into their layers; yield (ours, which rows of it, theirs, a name)."""
    adapter, held = item.adapter, dict(item.adapter.named_parameters())
    layers = {path: theirs.base_model.model.get_submodule(path) for path, _ in parts(ours, item.site)}
    shared = []
    for path, rows in parts(ours, item.site):
        layer, prefix = layers[path], PREFIXES.get(path.rpartition(".")[2], "")
        own = f"{prefix}lora_A" in held
        A, B = (held[f"{prefix if own else ''}lora_{side}"] for side in "AB")
        at = slice(None) if own else rows
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B[at])
            if "magnitude" in held:
                layer.lora_magnitude_vector["default"].weight.copy_(adapter.magnitude[rows])
                yield held["magnitude"], rows, [layer.lora_magnitude_vector["default"].weight], f"m of {path}"
        yield B, None if own else rows, [layer.lora_B["default"].weight], f"B of {path}"
        shared.append(layer.lora_A["default"].weight)
        if own:
            yield A, None, [shared.pop()], f"A of {path}"
    if shared:
        yield held["lora_A"], None, shared, f"A of {item.site.name}"


@pytest.mark.parametrize("kind", ["t5", "t5v11"])
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_fused_linears_share_their_a(kind: str, method: type[LoRA], tmp_path: Path) -> None:
    transform = method(dim=4, alpha=8, target_modules=EVERYTHING)
    assert compare(kind, tmp_path / "hf", transform, use_dora=method is DoRA) > 0


@pytest.mark.parametrize("kind", ["t5", "t5v11"])
def test_each_linear_has_an_update_of_its_own(kind: str, tmp_path: Path) -> None:
    """Two encoder layers of 4 + 3 linears, three decoder layers of 8 + 3, two factors each."""
    mlp = 2 if kind == "t5" else 3
    found = compare(kind, tmp_path / "hf", CanonicalLoRA(dim=4, alpha=8))
    assert found == 2 * (2 * (4 + mlp) + 3 * (8 + mlp))


@pytest.mark.parametrize("method", [LoRA, DoRA, CanonicalLoRA])
def test_layers_of_encoder_and_decoder_are_chosen_apart(method: type[LoRA]) -> None:
    model = tiny("t5v11")
    model.add_adapter(method(dim=2, layers={"encoder": [1], "decoder": [0, 2]}))
    assert {(g.site.part, g.site.layer) for g in model.stack.grafted[method.short_name()]} == {
        ("encoder", 1),
        ("decoder", 0),
        ("decoder", 2),
    }
    with pytest.raises(MatchError, match="layers has 2, but the model's layers are 0 to 1"):
        model.add_adapter(method("second", layers={"encoder": [2]}))
    with pytest.raises(MatchError, match="layers names 'middle'; valid: decoder, encoder"):
        model.add_adapter(method("third", layers={"middle": [0]}))


@pytest.mark.parametrize("method", [LoRA, DoRA, CanonicalLoRA])
def test_cross_attention_merges(method: type[LoRA]) -> None:
    model = tiny("t5v11")
    targets = ["cross_attention.linear_q", "linear_k" if method is CanonicalLoRA else "linear_kv"]
    model.add_adapter(method(dim=4, target_modules=targets))
    shake(model, 0.05)  # T5 does not scale its scores: with twice as much it makes 1e-4 of fp32's rounding
    with torch.no_grad():
        live = model(*ids(), *masks())
        with model.adapters_disabled():
            assert not torch.allclose(model(*ids(), *masks()), live, rtol=1e-2, atol=1e-2)
        model.merge_adapters()
        close(model(*ids(), *masks()), live, "merged")
        model.unmerge_adapters()
        assert torch.equal(model(*ids(), *masks()), live)
