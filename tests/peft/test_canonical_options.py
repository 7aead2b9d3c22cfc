"""Canonical adapters beside a sub-layer, tied across layers, around a mixture: against hooks, where nothing is ours."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from graftwork import models
from graftwork.errors import ConfigError, MatchError, ParallelismError
from graftwork.models import GPT
from graftwork.peft import CanonicalAdapter, report
from tests.contracts.methods import adapter_parameters, make, shake
from tests.contracts.methods import loss as answer_loss
from tests.helpers.tiny_hf import ODD_VOCABULARY, make_tiny, oracle

TOLERANCE = 1e-5
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
NAME = "canonical_adapter"
Copies = dict[str, Tensor]


def tokens() -> Tensor:
    return torch.randint(ODD_VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(5))


def loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    found, wanted = found.detach(), wanted.detach()
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), what


def update(x: Tensor, held: Copies) -> Tensor:
    """NeMo's formula: W_out act(W_in LN(x)), without the skip."""
    normed = F.layer_norm(x, x.shape[-1:], held["norm_weight"], held["norm_bias"], 1e-5)
    return F.silu(normed @ held["linear_in"].T) @ held["linear_out"].T


def leaves(adapter: nn.Module) -> Copies:
    return {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}


def hooked(theirs: nn.Module, family: str, layer: int, leaf: str, held: Copies, parallel: bool) -> None:
    """Adapt one sub-layer of transformers' model, which begins with its norm."""
    gpt2 = family == "gpt2"
    block = (theirs.transformer.h if gpt2 else theirs.model.layers)[layer]
    if leaf == "mlp":
        norm, module = (block.ln_2 if gpt2 else block.post_attention_layernorm), block.mlp
    else:
        norm, module = (block.ln_1, block.attn) if gpt2 else (block.input_layernorm, block.self_attn)
    bias = module.c_proj.bias if gpt2 else 0.0
    read: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        changed = h + update(read.pop() if parallel else h - bias, held)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    module.register_forward_hook(hook)


def compared(family: str, directory: Path, parallel_there: bool | None = None, **options: Any) -> GPT:
    """Compare logits and gradients with transformers' model; ``parallel_there``: what the hooks read instead."""
    make_tiny(family, directory)
    ours, theirs = models.load(directory), oracle(directory).requires_grad_(False)
    ours.add_adapter(CanonicalAdapter(dim=6, **options))
    shake(ours, 0.2)
    held: dict[str, Copies] = {}
    parallel = options.get("parallel", False) if parallel_there is None else parallel_there
    for item in ours.stack.grafted[NAME]:
        # a tied bottleneck has no parameters: those of the first adapted layer serve it
        copies = held.setdefault(item.site.leaf if options.get("tie_layers") else item.site.name, leaves(item.adapter))
        hooked(theirs, family, item.site.layer, item.site.leaf, copies, parallel)
    found, wanted = ours(tokens()), theirs(tokens()).logits
    assert_close(found, wanted, "logits")
    loss(found).backward()
    loss(wanted).backward()
    for tensor in ours.stack.tensors(NAME):
        copies = held.get(tensor.site, held.get(tensor.site.rpartition(".")[2], {}))
        assert_close(tensor.parameter.grad, copies[tensor.name].grad, f"gradient of {tensor.key}")
    return ours


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {"parallel": True},
        {"tie_layers": True},
        {"parallel": True, "tie_layers": True, "sites": ["mlp"], "layers": [3, 1]},
    ],
    ids=lambda o: "+".join(o),
)
def test_parallel_and_tied_equal_hooks_on_transformers(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours = compared(family, tmp_path / "hf", **options)
    each = 2 * 48 * 6 + 2 * 48
    sublayers = 1 if "layers" in options else 2 if options.get("tie_layers") else 8
    assert sum(row.parameters for row in report.sites(ours.stack)) == each * sublayers
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == each * sublayers


def test_the_comparison_notices_an_adapter_that_reads_the_output(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="logits"):
        compared("llama", tmp_path / "hf", parallel_there=False, parallel=True)


@pytest.mark.parametrize("options", [{}, {"parallel": True}, {"tie_layers": True}], ids=["behind", "parallel", "tied"])
def test_around_a_mixture_it_reads_all_experts_together(options: dict[str, bool]) -> None:
    """Behind it, the experts' weighted sum; beside it, what the norm in front of the mixture returns."""
    ours, bare = make(sizes=EXPERTS), make(sizes=EXPERTS)
    ours.add_adapter(CanonicalAdapter(dim=6, sites=["mlp"], **options))
    shake(ours, 0.2)
    owners = [item.adapter.held for item in ours.stack.grafted[NAME]]
    copies = {id(owner): leaves(owner) for owner in owners}

    def hook(held: Copies, _: nn.Module, inputs: Any, output: Any) -> Any:
        return (output[0] + update(inputs[0] if options.get("parallel") else output[0], held), *output[1:])

    for owner, layer in zip(owners, bare.module.decoder.layers, strict=True):
        layer.mlp.register_forward_hook(partial(hook, copies[id(owner)]))
    for parameter in bare.parameters():
        parameter.requires_grad_(False)
    ids = tokens() % bare.shape.vocab_size
    found, wanted = ours(ids), bare(ids)
    assert_close(found, wanted, "logits")
    for logits in (found, wanted):
        logits.square().mean().backward()
    for owner in owners:
        for name, parameter in owner.named_parameters():
            assert_close(parameter.grad, copies[id(owner)][name].grad, f"gradient of {name}")


def test_a_tied_bottleneck_is_saved_once_and_serves_every_layer(tmp_path: Path) -> None:
    model, twin = make(), make()
    model.add_adapter(CanonicalAdapter(dim=4, tie_layers=True))
    shake(model, 0.3)
    model.save_adapters(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 8 and all(".layers.0." in key for key in tensors)
    assert len(list(model.stack.adapters())) == 4 and len(list(adapter_parameters(model))) == 8
    twin.load_adapters(tmp_path / "adapter")
    ids = tokens() % model.shape.vocab_size
    with torch.no_grad():
        assert torch.equal(model(ids), twin(ids))
        for _, parameter in adapter_parameters(twin):  # the second layer has lost them too
            parameter.zero_()
        with model.adapters_disabled():
            assert torch.equal(model(ids), twin(ids))
    twin.delete_adapter(NAME)
    assert not list(adapter_parameters(twin))


def test_tied_layers_train_the_same_through_recomputation() -> None:
    found = []
    for recompute in (None, "full"):
        model = make(recompute=recompute).train()
        model.add_adapter(CanonicalAdapter(dim=4, tie_layers=True, parallel=True))
        shake(model, 0.2)
        answer_loss(model).backward()
        found.append([p.grad for _, p in adapter_parameters(model)])
    for plain, again in zip(*found, strict=True):
        assert plain.abs().max() > 0 and torch.allclose(plain, again, rtol=1e-5, atol=1e-7)


def test_tied_layers_are_refused_over_pipeline_stages() -> None:
    host = make().stack.host
    config = copy.copy(host.config)
    config.pipeline_model_parallel_size = 2
    with pytest.raises(
        ParallelismError, match=r"tie_layers=True needs pipeline_model_parallel_size=1, not 2"
    ) as caught:
        CanonicalAdapter(tie_layers=True).find(replace(host, config=config))
    assert "\n" not in str(caught.value)
    assert CanonicalAdapter().find(replace(host, config=config))


def test_cross_attention_is_refused_where_there_is_none() -> None:
    """megatron-core's layers have a place of that name in every model."""
    model = make()
    with pytest.raises(MatchError, match="sites has 'cross_attention', which this model does not have; .*attention"):
        model.add_adapter(CanonicalAdapter(sites=["mlp", "cross_attention"]))
    assert not model.adapters and all(p.requires_grad for p in model.parameters())
    model.add_adapter(CanonicalAdapter())
    assert {item.site.leaf for item in model.stack.grafted[NAME]} == {"self_attention", "mlp"}


@pytest.mark.parametrize("field", ["parallel", "tie_layers"])
def test_a_switch_is_true_or_false(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be True or False, got 'no'"):
        CanonicalAdapter(**{field: "no"})
