"""Mistral: LLaMA's layers, 8 query groups."""

from graftwork.models.shape import Shape
from graftwork.models.shapes.published import published, shape_of


@published
def mistral_7b(**overrides: object) -> Shape:
    """Mistral 7B 0.3 (Jiang et al. 2023, arXiv 2310.06825; config.json of mistralai/Mistral-7B-v0.3): no window."""
    return shape_of(
        overrides,
        family="mistral",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=32768,
        max_position_embeddings=32768,
        rotary_base=1e6,
    )
