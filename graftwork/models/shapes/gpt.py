"""GPT-2 and GPT-3 shapes: LayerNorm, learned positions, GELU (tanh form), biases, tied embeddings."""

from graftwork.models.shape import Shape
from graftwork.models.shapes.published import published, shape_of


def _gpt(overrides: dict[str, object], **sizes: object) -> Shape:
    return shape_of(
        overrides,
        family="gpt2",
        vocab_size=50257,
        normalization="LayerNorm",
        activation="gelu_tanh",
        add_bias_linear=True,
        position_embedding="learned",
        tie_embeddings=True,
        **sizes,
    )


@published
def gpt2_124m(**overrides: object) -> Shape:
    """GPT-2 124M (Radford et al. 2019)."""
    return _gpt(
        overrides,
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        max_position_embeddings=1024,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )


@published
def gpt3_175b(**overrides: object) -> Shape:
    """GPT-3 175B (Brown et al. 2020, arXiv 2005.14165), with dense attention in every layer."""
    return _gpt(
        overrides,
        num_layers=96,
        hidden_size=12288,
        ffn_hidden_size=49152,
        num_attention_heads=96,
        max_position_embeddings=2048,
    )
