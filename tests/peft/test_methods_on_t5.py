"""(IA)3, canonical adapters and Selective on an encoder-decoder, against Hugging Face's models."""

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork import models
from graftwork.models import T5, shapes
from graftwork.optim import AdamW
from graftwork.peft import IA3, CanonicalAdapter, Selective, report
from tests.contracts.methods import shake
from tests.helpers.tiny_t5 import ids, make_t5, masks, oracle
from tests.peft import hf_lora
from tests.peft.test_lora_on_t5 import parts

close = partial(hf_lora.assert_close, tolerance=5e-5)
"""That of the base's logits: queries and keys are not scaled, which makes roundings grow."""


def answers(model: Any) -> Tensor:
    """Return the logits of padded rows; those at padding are zero in both."""
    (source, target), (source_mask, target_mask) = ids(), masks()
    if isinstance(model, T5):
        return model(source, target, source_mask, target_mask)
    found = model(
        input_ids=source, attention_mask=source_mask, decoder_input_ids=target, decoder_attention_mask=target_mask
    )
    return found.logits * target_mask.unsqueeze(-1)


def loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids()[1].roll(-1, 1).flatten())


@pytest.mark.parametrize(("attention", "theirs_too"), [(None, r".*"), (["cross"], r".*(EncDecAttention|DenseRelu).*")])
def test_ia3_equals_peft(attention: list[str] | None, theirs_too: str, tmp_path: Path) -> None:
    ours, theirs = models.load(make_t5("t5v11", tmp_path / "hf")), oracle(tmp_path / "hf")
    ours.add_adapter(IA3(attention=attention))
    shake(ours, 0.1)
    config = peft.IA3Config(target_modules=rf"{theirs_too}\.(k|v|wo)", feedforward_modules=r".*\.wo")
    theirs = peft.get_peft_model(theirs, config).eval()
    pairs = []
    for item in ours.stack.grafted["ia3"]:
        for path, _ in parts(ours, item.site):
            leaf = path.rpartition(".")[2]
            if leaf in ("k", "v", "wo"):
                scale = getattr(item.adapter, "scale_ffn" if leaf == "wo" else f"scale_{leaf}")
                pairs.append((scale, theirs.base_model.model.get_submodule(path).ia3_l["default"]))
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters()) == (11 if attention else 21)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.view_as(other))
    found, wanted = answers(ours), answers(theirs)
    close(found, wanted, "logits")
    loss(found).backward()
    loss(wanted).backward()
    for mine, other in pairs:
        close(mine.grad, other.grad.view_as(mine), "gradient")


def test_ia3_of_layers_of_one_part(tmp_path: Path) -> None:
    ours = models.load(make_t5("t5", tmp_path / "hf"))
    ours.add_adapter([IA3(layers={"encoder": [1]}), CanonicalAdapter(dim=2, layers={"encoder": [0]})])
    names = {name: {item.site.name for item in ours.stack.grafted[name]} for name in ours.adapters}
    assert names["ia3"] == {f"encoder.layers.1.{x}" for x in ("self_attention.linear_qkv", "mlp.linear_fc2")}
    assert names["canonical_adapter"] == {f"encoder.layers.0.{x}" for x in ("self_attention", "mlp")}


@pytest.mark.parametrize(
    "options", [{}, {"tie_layers": True}, {"sites": ["cross_attention"], "parallel": True}], ids=str
)
def test_canonical_adapters_equal_hooks(options: dict[str, Any], tmp_path: Path) -> None:
    """Beside cross attention, whose norm stands in front of it, the adapter reads what the norm returns."""
    ours, theirs = models.load(make_t5("t5v11", tmp_path / "hf")), oracle(tmp_path / "hf").requires_grad_(False)
    ours.add_adapter(CanonicalAdapter(dim=6, **options))
    shake(ours, 0.2)
    copies: dict[int, dict[str, Tensor]] = {}

    def hook(held: dict[str, Tensor], _: nn.Module, inputs: Any, named: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        x = (inputs[0] if inputs else named["hidden_states"]) if options.get("parallel") else h
        normed = F.layer_norm(x, x.shape[-1:], held["norm_weight"], held["norm_bias"], 1e-5)
        changed = h + F.silu(normed @ held["linear_in"].T) @ held["linear_out"].T
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    for item in ours.stack.grafted["canonical_adapter"]:
        owner = item.adapter.held
        held = copies.setdefault(
            id(owner), {n: p.detach().clone().requires_grad_() for n, p in owner.named_parameters()}
        )
        decoder = item.site.part == "decoder"
        place = {"self_attention": 0, "cross_attention": 1, "mlp": 2 if decoder else 1}[item.site.leaf]
        name = ("SelfAttention", "EncDecAttention" if decoder else "DenseReluDense", "DenseReluDense")[place]
        module = getattr(getattr(theirs, item.site.part).block[item.site.layer].layer[place], name)
        module.register_forward_hook(partial(hook, held), with_kwargs=True)
    assert len(copies) == (3 if options.get("sites") else 5 if options else 2 * 2 + 3 * 3)
    found, wanted = answers(ours), answers(theirs)
    close(found, wanted, "logits")
    loss(found).backward()
    loss(wanted).backward()
    for item in ours.stack.grafted["canonical_adapter"]:
        for name, parameter in item.adapter.named_parameters():
            close(parameter.grad, copies[id(item.adapter)][name].grad, f"gradient of {name}")


@pytest.mark.parametrize(
    ("kind", "patterns", "theirs_too"),
    [
        ("t5v11", ["norm", "relative_attention_bias"], lambda n: "layer_norm" in n or "relative_attention_bias" in n),
        ("t5", ["word_embeddings", "cross_attention"], lambda n: "shared" in n or "EncDecAttention" in n),
    ],
)
def test_selective_trains_as_transformers_does(kind: str, patterns: list[str], theirs_too: Any, tmp_path: Path) -> None:
    ours, theirs = models.load(make_t5(kind, tmp_path / "hf")), oracle(tmp_path / "hf")
    ours.add_adapter(Selective(patterns=patterns))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(theirs_too(name))
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == count > 0
    learning = {"lr": 1e-2, "eps": 1e-2}
    mine, _ = AdamW(**learning, schedule="constant").build(ours, 3)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **learning, weight_decay=0.0)
    before = answers(theirs).detach()
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            loss(answers(model)).backward()
            optimizer.step()
    with torch.no_grad():
        wanted = answers(theirs)
        assert (wanted - before).abs().max() > 1e-2
        close(answers(ours), wanted, "logits after training")


def test_ia3_on_t5_xl_trains_as_many_parameters_as_the_paper_says() -> None:
    """540,672 (arXiv 2205.05638): 24 layers of 2 x 2048 + 5120, and 24 with cross attention; no memory is needed."""
    model = T5(shapes.t5v11_xl(), dtype="bf16")
    with torch.device("meta"):
        model.module = model.build()[0]
    model.add_adapter(IA3())
    assert sum(site.parameters for site in report.sites(model.stack)) == 540_672
