"""Random base weights: the same model in every layout, spread as megatron-core's own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork import parallel
from graftwork.core.gpt import build_gpt
from graftwork.models import GPT
from tests.contracts.methods import shape
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.tiny_gpt import cut, global_name

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
LAYOUTS: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("llama", {}, {"tensor": 2}),
    ("gpt2", {}, {"tensor": 2}),
    ("llama_tied", {}, {"pipeline": 2}),
    ("llama", EXPERTS, {"expert": 2}),
]


def built(family: str, sizes: dict[str, Any], seed: int = 1234) -> GPT:
    model = GPT(shape(family, **sizes), dtype="fp32", seed=seed)
    model.configure_model()
    return model


def parts(rank: int, world_size: int) -> list[dict[str, tuple[Any, Tensor]]]:
    """Return, per layout: global name -> (how it is cut, this rank's part)."""
    found = []
    for family, sizes, layout in LAYOUTS:
        parallel.initialize(layout_of(**layout))
        (chunk,) = built(family, sizes).chunks
        named = {global_name(chunk, n): (cut(chunk, n, p), p.detach().clone()) for n, p in chunk.named_parameters()}
        found.append(named)
    return found


@pytest.mark.fault(
    "initial values depend on the tensor-parallel size",
    "a tensor is drawn whole from seed and name, then cut",
)
@pytest.mark.processes
def test_every_layout_starts_from_the_same_model() -> None:
    ranks = run_ranks(parts, 2)
    for i, (family, sizes, _) in enumerate(LAYOUTS):
        whole = dict(built(family, sizes).chunks[0].named_parameters())
        first, second = (rank[i] for rank in ranks)
        for name in {*first, *second}:
            cuts = [rank[name] for rank in (first, second) if name in rank]
            sharding = cuts[0][0]
            full = sharding.join([part for _, part in cuts]) if sharding.dim is not None else cuts[0][1]
            tied = "embedding.word_embeddings.weight" if name not in whole else name
            wanted = whole[tied]
            assert torch.equal(full[: len(wanted)], wanted), (family, name)
            assert not full[len(wanted) :].any(), "padding of the vocabulary is zero"
    parallel.destroy()


def test_values_spread_as_megatron_core_s_own_and_follow_the_seed() -> None:
    sizes = {"hidden_size": 128, "ffn_hidden_size": 256, "vocab_size": 1001, "max_position_embeddings": 256}
    model = built("gpt2", sizes)
    parallel.seed_rng(1)
    wanted = build_gpt(model.config, pre_process=True, post_process=True, **model.shape.gpt_arguments(1))
    ours = dict(model.chunks[0].named_parameters())
    for name, theirs in wanted.named_parameters():
        mine, megatron = ours[name].detach(), theirs.detach()
        assert float(mine.std()) == pytest.approx(float(megatron.std()), rel=0.05), name
        assert float(mine.mean()) == pytest.approx(float(megatron.mean()), abs=2e-3), name
    again, other = (dict(built("gpt2", sizes, seed).chunks[0].named_parameters()) for seed in (1234, 7))
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(again[name], ours[name]) and not torch.equal(other[name], ours[name])
    layers = [ours[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1)]
    assert not torch.equal(*layers)
    parallel.destroy()
