"""Checkpoints of mixtures of experts: routing, both ways to store experts, and experts spread over ranks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from graftwork import parallel
from graftwork.errors import CheckpointError, ConfigError
from graftwork.models import shapes
from graftwork.models.shapes import Shape
from graftwork.models.weights import (
    Rule,
    export_weights,
    fingerprint,
    hf_config,
    load,
    load_weights,
    mapping_for,
    read_config,
    shape_from_hf,
)
from tests.helpers.core import build, loaded, logits
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.tiny_hf import ODD_VOCABULARY, make_tiny, oracle, tiny_model

MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe"]
SOME = ["qwen3_moe_some", "qwen2_moe_every_other"]
"""Not every layer is one."""
TOLERANCE = 2e-5


def tokens() -> torch.Tensor:
    return torch.randint(ODD_VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours[..., : theirs.shape[-1]] - theirs).abs().max() / theirs.abs().max())


def stacked(family: str, directory: Path) -> Path:
    """Save the tiny model as transformers holds it in memory: two tensors for all experts of a layer."""
    tiny_model(family).save_pretrained(directory, save_original_format=False)
    return directory


@pytest.mark.parametrize("experts, chosen", [(2, 2), (3, 2), (8, 2), (8, 5), (6, 6)])
def test_any_number_of_experts(experts: int, chosen: int, tmp_path: Path) -> None:
    directory = make_tiny("mixtral", tmp_path, num_local_experts=experts, num_experts_per_tok=chosen, hidden_size=32)
    module, shape = loaded(directory)
    assert (shape.num_moe_experts, shape.moe_router_topk) == (experts, chosen)
    with torch.no_grad():
        assert difference(logits(module, tokens()), oracle(directory)(tokens()).logits) < TOLERANCE


@pytest.mark.parametrize("change", ["moe_router_pre_softmax", "moe_router_topk"])
@pytest.mark.parametrize("family", MIXTURES)
def test_the_comparison_would_notice_another_routing(family: str, change: str, tmp_path: Path) -> None:
    directory = make_tiny(family, tmp_path / "hf")
    _, shape = loaded(directory)
    value = 4 if change == "moe_router_topk" else not shape.moe_router_pre_softmax
    other = build(replace(shape, **{change: value}))
    load_weights(other, shape, directory)
    with torch.no_grad():
        assert difference(logits(other, tokens()), oracle(directory)(tokens()).logits) > 100 * TOLERANCE


@pytest.mark.parametrize("family", MIXTURES)
def test_stacked_experts_are_the_same_model(family: str, tmp_path: Path) -> None:
    apart, together = make_tiny(family, tmp_path / "apart"), stacked(family, tmp_path / "together")
    assert load_file(apart / "model.safetensors").keys() != load_file(together / "model.safetensors").keys()
    module, shape = loaded(together)
    with torch.no_grad():
        assert difference(logits(module, tokens()), oracle(together)(tokens()).logits) < TOLERANCE
    assert torch.equal(logits(module, tokens()), logits(loaded(apart)[0], tokens()))
    assert fingerprint(apart) == fingerprint(together)
    # They leave as the published checkpoints have them.
    export_weights(module, shape, tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (apart, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_one_changed_bit_of_a_stack_changes_the_fingerprint(tmp_path: Path) -> None:
    directory = stacked("mixtral", tmp_path)
    first = fingerprint(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.3.mlp.experts.down_proj"][-1, -1, -1] += 1e-3
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(directory) != first


def test_a_stack_of_another_shape_or_beside_its_parts_is_refused(tmp_path: Path) -> None:
    directory = stacked("mixtral", tmp_path)
    path, name = directory / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"4 tensor\(s\) missing: model.layers.0.block_sparse_moe.experts.0.w2.we"
    ):
        loaded(directory)
    part = {"model.layers.0.block_sparse_moe.experts.0.w2.weight": tensors[name][0].clone()}
    save_file({**tensors, **part}, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 tensor\(s\) unexpected: model.layers.0.block_sparse_moe.experts.down"
    ):
        loaded(directory)


def test_what_no_mixture_can_be() -> None:
    tiny = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "vocab_size": 101}
    with pytest.raises(
        ConfigError, match=r"Shape.moe_router_topk is 1; a number from 2 to num_moe_experts=4 is valid,"
    ):
        shapes.llama2_7b(**tiny, num_moe_experts=4, moe_router_topk=1)
    with pytest.raises(
        ConfigError, match=r"Shape.moe_router_topk is 5; a number from 1 to num_moe_experts=4 is valid\."
    ):
        shapes.llama2_7b(**tiny, num_moe_experts=4, moe_router_topk=5, moe_router_pre_softmax=True)
    with pytest.raises(ConfigError, match=r"Shape.num_moe_experts is 1; at least 2 is valid, None for a dense model\."):
        shapes.llama2_7b(**tiny, num_moe_experts=1)
    with pytest.raises(ConfigError, match="moe_shared_expert_gate=True needs moe_shared_expert_intermediate_size"):
        shapes.llama2_7b(**tiny, num_moe_experts=4, moe_shared_expert_gate=True)
    for wrong in ({}, {"num_moe_experts": 4, "add_bias_linear": True}):
        with pytest.raises(ConfigError, match="size=8 needs num_moe_experts and add_bias_linear=False; they are"):
            shapes.llama2_7b(**tiny, **wrong, moe_shared_expert_intermediate_size=8)
    before_the_choice = shapes.llama2_7b(**tiny, family="mixtral", num_moe_experts=4, moe_router_pre_softmax=True)
    with pytest.raises(ConfigError, match="no Hugging Face mixtral model has moe_router_pre_softmax=True"):
        hf_config(before_the_choice)


def test_layers_without_experts(tmp_path: Path) -> None:
    tiny = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "vocab_size": 101}
    mixed = {**tiny, "family": "qwen3_moe", "qk_layernorm": True, "num_moe_experts": 4}
    shape = shapes.llama2_7b(**mixed, moe_layer_freq=(0, 1, 1))
    assert shape.moe_layer_freq == [0, 1, 1] and hf_config(shape)["mlp_only_layers"] == [0]
    assert shape_from_hf(hf_config(shape)) == shape
    assert shape.transformer_config().moe_layer_freq == [0, 1, 1]
    assert shapes.llama2_7b(**mixed, moe_layer_freq=[1, 1, 1]) == shapes.llama2_7b(**mixed)
    module = build(shape)
    assert shape.total_parameters() == sum(p.numel() for p in module.parameters())
    assert [hasattr(layer.mlp, "experts") for layer in module.decoder.layers] == [False, True, True]
    for wrong in ([0, 1], [0, 1, 2], [0, 1, True], "011", 2):
        with pytest.raises(ConfigError, match="a list of 3 numbers is valid, 1 for a layer that is a mixture and"):
            shapes.llama2_7b(**mixed, moe_layer_freq=wrong)
    for wrong in ({**mixed, "moe_layer_freq": [0, 0, 0]}, {**tiny, "moe_layer_freq": [0, 1, 1]}):
        with pytest.raises(ConfigError, match="moe_layer_freq needs num_moe_experts and a 1 for at least one layer"):
            shapes.llama2_7b(**wrong)
    with pytest.raises(ConfigError, match=r"no Hugging Face mixtral model has moe_layer_freq=\[0, 1, 1\]; None is"):
        mapping_for(shapes.llama2_7b(**{**mixed, "family": "mixtral"}, moe_layer_freq=[0, 1, 1]))


def load_and_export(rank: int, world: int, sizes: dict[str, int], sources: list[Path], target: Path) -> list:
    parallel.initialize(layout_of(**sizes))
    results = []
    for source in sources:
        shape = shape_from_hf(read_config(source))
        spread = {"expert_model_parallel_size": sizes["expert"], "sequence_parallel": "tensor" in sizes}
        module, read = build(shape, **spread), list[str]()
        with patch.object(load, "read", _recording(read)):
            load_weights(module, shape, source)
        export_weights(module, shape, target / source.name)
        results.append((full_logits(module, shape), read))
    return results


def _recording(read: list[str]) -> Callable[..., torch.Tensor]:
    original = load.read

    def recording(rule: Rule, *rest: Any) -> torch.Tensor:
        read.extend(name for name in rule.hf if ".experts." in name)
        return original(rule, *rest)

    return recording


def full_logits(module: torch.nn.Module, shape: Shape) -> torch.Tensor | None:
    """Return logits [b, s, padded vocabulary] on the last stage, None elsewhere."""
    if not parallel.is_first_stage():
        received = torch.empty(tokens().shape[1], tokens().shape[0], shape.hidden_size)
        dist.recv(received, src=dist.get_global_rank(parallel.pp_group(), 0))
        module.set_input_tensor(received)
    output = logits(module, tokens())
    if not parallel.is_last_stage():
        dist.send(output.contiguous(), dst=dist.get_global_rank(parallel.pp_group(), 1))
        return None
    parts = [torch.empty_like(output) for _ in range(parallel.tp_size())]
    dist.all_gather(parts, output.contiguous(), group=parallel.tp_group())
    return torch.cat(parts, dim=-1)


LAYOUTS = [
    pytest.param({"expert": 2}, 2, id="ep2"),
    pytest.param({"tensor": 2, "expert": 2}, 2, id="tp2_sp_ep2"),
    pytest.param({"pipeline": 2, "expert": 2}, 4, id="pp2_ep2", marks=pytest.mark.slow),
]


@pytest.mark.processes
@pytest.mark.parametrize("sizes, world", LAYOUTS)
def test_experts_spread_over_ranks_equal_one_process(sizes: dict[str, int], world: int, tmp_path: Path) -> None:
    sources = [make_tiny(family, tmp_path / family) for family in (*MIXTURES, *SOME)]
    ranks = run_ranks(load_and_export, world, sizes, sources, tmp_path / "out")
    for index, source in enumerate(sources):
        expected = logits(loaded(source)[0], tokens())
        outputs = [rank[index][0] for rank in ranks if rank[index][0] is not None]
        assert all(difference(found[..., :ODD_VOCABULARY], expected) < 5e-6 for found in outputs), source.name
        before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / "out" / source.name))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        # No rank has read another rank's experts, and together they have read every one.
        experts = sorted(name for name in before if ".experts." in name)
        assert sorted(name for rank in ranks for name in rank[index][1]) == experts
