"""Qwen shapes, dense: RMSNorm, rotary positions, SwiGLU; biases on qkv in 2.5, normed queries and keys in 3."""

from graftwork.models.shape import Shape
from graftwork.models.shapes.published import published, shape_of


@published
def qwen2_5_7b(**overrides: object) -> Shape:
    """Qwen2.5 7B (Yang et al. 2024, arXiv 2412.15115; config.json of Qwen/Qwen2.5-7B): 4 query groups."""
    return shape_of(
        overrides,
        family="qwen2",
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        vocab_size=152064,
        max_position_embeddings=131072,
        layernorm_epsilon=1e-6,
        rotary_base=1e6,
        add_qkv_bias=True,
    )


def _qwen3(overrides: dict[str, object], **sizes: object) -> Shape:
    return shape_of(
        overrides,
        family="qwen3",
        num_query_groups=8,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        layernorm_epsilon=1e-6,
        rotary_base=1e6,
        qk_layernorm=True,
        **sizes,
    )


@published
def qwen3_0_6b(**overrides: object) -> Shape:
    """Qwen3 0.6B (Yang et al. 2025, arXiv 2505.09388; config.json of Qwen/Qwen3-0.6B): tied, wide heads."""
    sizes = {"num_layers": 28, "hidden_size": 1024, "ffn_hidden_size": 3072, "num_attention_heads": 16}
    return _qwen3(overrides, tie_embeddings=True, **sizes)


@published
def qwen3_8b(**overrides: object) -> Shape:
    """Qwen3 8B (Yang et al. 2025, arXiv 2505.09388; config.json of Qwen/Qwen3-8B)."""
    return _qwen3(overrides, num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32)
