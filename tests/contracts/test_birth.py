"""A fresh adapter is the identity, and no base parameter changes its name."""

import re
from typing import Any

import pytest
import torch

from graftwork.models import GPT
from tests.contracts.methods import (
    STACKS,
    adapter_parameters,
    every_family,
    every_stack,
    make,
    prompted,
    same,
    shake,
    tokens,
)


def sharded(model: GPT) -> dict[str, Any]:
    return {k: v for chunk in model.chunks for k, v in chunk.sharded_state_dict().items()}


def described(value: Any) -> tuple:
    """What a checkpoint depends on: key, global shape and place."""
    return value.key, getattr(value, "global_shape", None), getattr(value, "global_offset", None)


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Leave out megatron-core's empty extra states."""
    return {k: v for k, v in state.items() if v is not None}


@every_family
@every_stack
def test_fresh_adapters_are_the_identity(family: str, stack: str) -> None:
    model = make(family)
    with torch.no_grad():
        base = model(tokens())
        model.add_adapter(STACKS[stack]())
        assert torch.equal(model(tokens()), base)
        shake(model)
        changed = model(prompted(model, tokens()))[:, -tokens().shape[1] :]
    assert (changed - base).abs().max() > 1e-3, "an adapter that never acts would pass the first assertion"


@every_family
@every_stack
def test_base_names_do_not_change(family: str, stack: str) -> None:
    model = make(family)
    parameters = [n for n, _ in model.named_parameters()]
    buffers = [n for n, _ in model.named_buffers()]
    state, shards = model.state_dict(), sharded(model)
    model.add_adapter(STACKS[stack]())
    names = "|".join(model.adapters)
    ours = re.compile(rf"\.adapters\.({names})\.[\w.]+$")

    def base(keys: Any) -> list[str]:
        return [k for k in keys if not ours.search(k)]

    assert base(n for n, _ in model.named_parameters()) == parameters
    assert [n for n, _ in model.named_buffers()] == buffers
    assert base(model.state_dict()) == list(state)
    assert base(sharded(model)) == list(shards)
    for key, value in sharded(model).items():
        if key in shards:
            assert described(value) == described(shards[key]), key
    added = {n for n, _ in model.named_parameters()} - set(parameters)
    assert added == set(model.state_dict()) - set(state)
    assert len(added) == len(set(sharded(model)) - set(shards))
    assert {ours.search(n).group(1) for n in added} == {n for n in model.adapters if model.stack.grafted[n]}


@every_family
@pytest.mark.parametrize("stack", ["all"])
def test_base_state_loads_after_wrapping_and_adapters_load_by_name(family: str, stack: str) -> None:
    source, target = make(family), make(family, seed=99)
    target.add_adapter(STACKS[stack]())
    shake(target)
    kept = {k: v.clone() for k, v in target.state_dict().items() if ".adapters." in k}
    result = target.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == set(kept)
    with target.adapters_disabled():
        assert torch.equal(target(tokens()), source(tokens()))
    assert same({k: v for k, v in target.state_dict().items() if ".adapters." in k}, kept)


@every_family
@every_stack
def test_the_whole_state_loads_strictly(family: str, stack: str) -> None:
    source, target = make(family), make(family, seed=99)
    for model in (source, target):
        model.add_adapter(STACKS[stack]())
    shake(source)
    state = source.state_dict()
    target.load_state_dict(state)
    assert same(tensors(target.state_dict()), tensors(state))
    assert torch.equal(target(prompted(target, tokens())), source(prompted(source, tokens())))
    first, _ = next(adapter_parameters(source))
    state[f"{first}_extra"] = state.pop(first)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key"):
        target.load_state_dict(state)


def test_names_of_a_small_model_are_these() -> None:
    """The whole tree of one layer: what a checkpoint holds."""
    model = make(sizes={"num_layers": 1})
    model.add_adapter(STACKS["all"]())
    layer = "module.decoder.layers.0."
    assert sorted(n for n, _ in model.named_parameters()) == sorted(
        [
            "module.embedding.word_embeddings.weight",
            *(
                f"module.embedding.word_embeddings.adapters.ptuning.{n}"
                for n in ("slots", "linear_in", "bias_in", "linear_out", "bias_out")
            ),
            *(
                f"{layer}{site}.adapters.canonical_adapter.{n}"
                for site in ("self_attention", "mlp")
                for n in ("norm_weight", "norm_bias", "linear_in", "linear_out")
            ),
            f"{layer}self_attention.linear_proj.weight",
            f"{layer}self_attention.linear_qkv.weight",
            f"{layer}self_attention.linear_qkv.layer_norm_weight",
            f"{layer}mlp.linear_fc1.weight",
            f"{layer}mlp.linear_fc1.layer_norm_weight",
            f"{layer}mlp.linear_fc2.weight",
            *(
                f"{layer}{site}.adapters.lora.{n}"
                for site in (
                    "self_attention.linear_qkv",
                    "self_attention.linear_proj",
                    "mlp.linear_fc1",
                    "mlp.linear_fc2",
                )
                for n in ("lora_A", "lora_B")
            ),
            *(f"{layer}self_attention.linear_qkv.adapters.ia3.{n}" for n in ("scale_k", "scale_v")),
            f"{layer}mlp.linear_fc2.adapters.ia3.scale_ffn",
            "module.decoder.final_layernorm.weight",
            "module.output_layer.weight",
        ]
    )
