"""Nemotron shapes: LayerNorm with zero-centred gamma, squared ReLU, rotary positions on half of each head."""

from graftwork.models.shape import Shape
from graftwork.models.shapes.published import published, shape_of


def _nemotron(overrides: dict[str, object], **sizes: object) -> Shape:
    return shape_of(
        overrides,
        family="nemotron",
        vocab_size=256000,
        max_position_embeddings=4096,
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=True,
        activation="squared_relu",
        rotary_percent=0.5,
        **sizes,
    )


@published
def minitron_4b(**overrides: object) -> Shape:
    """Minitron 4B, Nemotron-4 pruned (Muralidharan et al. 2024, arXiv 2407.14679; nvidia/Minitron-4B-Base)."""
    sizes = {"num_layers": 32, "hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24}
    return _nemotron(overrides, num_query_groups=8, **sizes)


@published
def nemotron3_8b(**overrides: object) -> Shape:
    """Nemotron-3 8B (NVIDIA 2023)."""
    return _nemotron(overrides, num_layers=32, hidden_size=4096, ffn_hidden_size=16384, num_attention_heads=32)


@published
def nemotron4_340b(**overrides: object) -> Shape:
    """Nemotron-4 340B (NVIDIA 2024, arXiv 2406.11704): 8 query groups."""
    return _nemotron(
        overrides,
        num_layers=96,
        hidden_size=18432,
        ffn_hidden_size=73728,
        num_attention_heads=96,
        num_query_groups=8,
    )
