"""Whole models through build_gpt: variants train, names are fixed, packing and the key/value cache change nothing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.identity_op import IdentityOp
from packaging.version import Version
from torch import Tensor, nn

from graftwork import parallel
from graftwork.compat import transformer_engine
from graftwork.core.specs import gpt_block_spec
from graftwork.errors import ConfigError
from tests.helpers import tiny_gpt

GPT3 = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "gated_linear_unit": False,
    "activation_func": F.gelu,
    "num_query_groups": 4,
}
NEMOTRON = {"normalization": "LayerNorm", "gated_linear_unit": False, "activation_func": squared_relu}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 96}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt3": (GPT3 | DROPOUT, {"position_embedding_type": "learned_absolute", "tied": True}),
    "llama": ({}, {}),
    "llama 3 rope": ({}, {"rope_scaling_factor": 8.0, "rotary_base": 500000}),
    "llama qk-norm and qkv bias": ({"qk_layernorm": True, "add_qkv_bias": True}, {}),
    "nemotron": (NEMOTRON | {"layernorm_zero_centered_gamma": True}, {"rotary_percent": 0.5}),
    "moe": (MOE | {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "aux_loss"}, {}),
    "moe allgather": (MOE | {"moe_token_dispatcher_type": "allgather"}, {}),
    "moe every other layer, shared expert": (
        MOE | {"moe_layer_freq": 2, "moe_shared_expert_intermediate_size": 32},
        {},
    ),
    "fused cross entropy": ({"cross_entropy_loss_fusion": True}, {}),
}


@pytest.fixture(autouse=True)
def world():
    parallel.ensure_initialized()
    yield
    parallel.destroy()


def rows(b: int = 2, s: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, tiny_gpt.VOCABULARY, (b, s), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.arange(s).expand(b, -1)


def logits(module: nn.Module, tokens: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
    return module(tokens, positions, None, **kwargs)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_learn(name: str) -> None:
    overrides, arguments = VARIANTS[name]
    module = tiny_gpt.build(tiny_gpt.config(**overrides), **arguments)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    tokens, positions = rows()
    losses = []
    for _ in range(4):
        loss = module(tokens, positions, None, labels=tokens).mean()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_parameter_names_do_not_depend_on_transformer_engine() -> None:
    module = tiny_gpt.build(tiny_gpt.config(num_layers=1, qk_layernorm=True))
    assert [name for name, _ in module.named_parameters()] == [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.self_attention.k_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_experts_are_separate_modules_behind_a_norm_of_their_own() -> None:
    cfg = tiny_gpt.config(num_layers=2, moe_layer_freq=[0, 1], **MOE)
    names = {name for name, _ in tiny_gpt.build(cfg).named_parameters()}
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in names
    assert "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight" in names


def test_expert_patterns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="moe_layer_freq"):
        gpt_block_spec(tiny_gpt.config(moe_layer_freq=[1, 0], **MOE))
    grouped = tiny_gpt.config(**MOE)
    grouped.moe_grouped_gemm = True
    with pytest.raises(ConfigError, match="moe_grouped_gemm"):
        gpt_block_spec(grouped)


def test_with_transformer_engine_the_layers_are_megatrons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification only: transformer-engine's modules themselves need CUDA."""
    monkeypatch.setattr(transformer_engine, "usable", lambda: True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", TESpecProvider, raising=False)
    monkeypatch.setattr("megatron.core.utils.get_te_version", lambda: Version("2.8.0"))
    provider = TESpecProvider()
    dense, experts = gpt_block_spec(tiny_gpt.config(num_layers=2, moe_layer_freq=[0, 1], **MOE)).layer_specs
    attention = dense.submodules.self_attention.submodules
    assert attention.linear_qkv is provider.column_parallel_layer_norm_linear()
    assert attention.core_attention is provider.core_attention()
    assert dense.submodules.pre_mlp_layernorm is IdentityOp
    assert experts.submodules.pre_mlp_layernorm is not IdentityOp


def test_a_packed_row_equals_its_sequences_alone() -> None:
    module = tiny_gpt.build(tiny_gpt.config())
    (first, p1), (second, p2) = rows(1, 11, 1), rows(1, 5, 2)
    alone = torch.cat([logits(module, first, p1), logits(module, second, p2)], 1)
    tokens, positions = torch.cat([first, second], 1), torch.cat([p1, p2], 1)

    def packed(cu: list[int]) -> Tensor:
        bounds = torch.tensor(cu, dtype=torch.int32)
        params = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=11, max_seqlen_kv=11)
        return logits(module, tokens, positions, packed_seq_params=params)

    torch.testing.assert_close(packed([0, 11, 16]), alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(packed([0, 10, 16]), alone, atol=1e-2), "a moved boundary must show"


def test_a_padding_mask_equals_the_shorter_sequence() -> None:
    module = tiny_gpt.build(tiny_gpt.config())
    tokens, positions = rows(1, 12)
    left = torch.cat([torch.full((1, 4), 7), tokens], 1)
    shifted = torch.cat([torch.zeros(1, 4, dtype=torch.long), positions], 1)
    mask = torch.zeros(1, 1, 1, 16, dtype=torch.bool)
    mask[..., :4] = True
    # rope is relative: 4 masked tokens in front only shift the positions
    padded = module(left, shifted, mask)
    assert bool(padded.isfinite().all())
    torch.testing.assert_close(padded[:, 4:], logits(module, tokens, positions), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(module(left, shifted, None)[:, 4:], padded[:, 4:], atol=1e-2)


def test_the_key_value_cache_gives_the_logits_of_a_full_forward() -> None:
    module = tiny_gpt.build(tiny_gpt.config()).eval()
    tokens, positions = rows(2, 12)
    with torch.no_grad():
        full = logits(module, tokens, positions)
        context = StaticInferenceContext(max_batch_size=2, max_sequence_length=tiny_gpt.LENGTH)
        for start, stop in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
            step = slice(start, stop)
            last = logits(
                module, tokens[:, step], positions[:, step], inference_context=context, runtime_gather_output=True
            )
            torch.testing.assert_close(last[:, -1], full[:, stop - 1], atol=1e-5, rtol=1e-5)
            context.sequence_len_offset += stop - start


def gradients(module: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    parallel.seed_rng(seed)
    tokens, positions = rows()
    module.zero_grad()
    module(tokens, positions, None, labels=tokens).mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective"])
def test_recompute_with_dropout_gives_the_same_gradients(recompute: dict[str, Any]) -> None:
    expected = gradients(tiny_gpt.build(tiny_gpt.config(**DROPOUT)))
    module = tiny_gpt.build(tiny_gpt.config(**DROPOUT, **recompute))
    found = gradients(module)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    other = gradients(module, seed=4)
    assert any(not torch.allclose(other[name], value) for name, value in expected.items()), "dropout must act"


def test_training_after_inference_mode_works() -> None:
    module = tiny_gpt.build(tiny_gpt.config())
    tokens, positions = rows()
    with torch.inference_mode():  # megatron-core caches rotary embeddings: they must not stay inference tensors
        logits(module, tokens, positions)
    assert gradients(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_forward_and_backward(dtype: torch.dtype) -> None:
    """fp32 parameters under autocast, and bf16 parameters, stay near the fp32 gradients."""
    expected = gradients(tiny_gpt.build(tiny_gpt.config()))
    module = tiny_gpt.build(tiny_gpt.config(params_dtype=dtype, bf16=dtype is torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        found = gradients(module)
    for name, value in expected.items():
        assert float((found[name].float() - value).norm() / value.norm()) < 0.1, name


def test_two_models_in_one_process_share_nothing() -> None:
    aux = MOE | {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "aux_loss"}
    for layers in (1, 3):
        assert gradients(tiny_gpt.build(tiny_gpt.config(num_layers=layers, **aux)))
        parallel.destroy()
        parallel.ensure_initialized()
