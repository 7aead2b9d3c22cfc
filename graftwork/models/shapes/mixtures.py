"""Mixtures of experts: RMSNorm, rotary positions, SwiGLU experts, no biases."""

from graftwork.models.shape import Shape
from graftwork.models.shapes.published import published, shape_of


@published
def mixtral_8x7b(**overrides: object) -> Shape:
    """Mixtral 8x7B (Jiang et al. 2024, arXiv 2401.04088): two of eight experts see a token, 8 query groups."""
    return shape_of(
        overrides,
        family="mixtral",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=32000,
        max_position_embeddings=32768,
        rotary_base=1e6,
        num_moe_experts=8,
        moe_router_topk=2,
    )


@published
def qwen3_30b_a3b(**overrides: object) -> Shape:
    """Qwen3 30B A3B (Yang et al. 2025, arXiv 2505.09388): eight of 128 narrow experts see a token."""
    return shape_of(
        overrides,
        family="qwen3_moe",
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        layernorm_epsilon=1e-6,
        rotary_base=1e6,
        qk_layernorm=True,
        num_moe_experts=128,
        moe_router_topk=8,
        moe_ffn_hidden_size=768,
    )
