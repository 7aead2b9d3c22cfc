"""LLaMA-type shapes: RMSNorm, rotary positions, SwiGLU, no biases."""

from graftwork.models.shape import Shape
from graftwork.models.shapes.published import published, shape_of


@published
def smollm2_135m(**overrides: object) -> Shape:
    """SmolLM2 135M (Ben Allal et al. 2025, arXiv 2502.02737): tied embeddings, 3 query groups."""
    return shape_of(
        overrides,
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rotary_base=100000.0,
        tie_embeddings=True,
    )


def _llama2(overrides: dict[str, object], **sizes: object) -> Shape:
    return shape_of(overrides, vocab_size=32000, max_position_embeddings=4096, **sizes)


@published
def llama2_7b(**overrides: object) -> Shape:
    """LLaMA 2 7B (Touvron et al. 2023, arXiv 2307.09288)."""
    return _llama2(overrides, num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32)


@published
def llama2_13b(**overrides: object) -> Shape:
    """LLaMA 2 13B (Touvron et al. 2023, arXiv 2307.09288)."""
    return _llama2(overrides, num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40)


@published
def llama2_70b(**overrides: object) -> Shape:
    """LLaMA 2 70B (Touvron et al. 2023, arXiv 2307.09288): 8 query groups."""
    return _llama2(
        overrides,
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
    )


def _llama3(overrides: dict[str, object], **sizes: object) -> Shape:
    fixed = {"num_query_groups": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rotary_base": 500000.0}
    return shape_of(overrides, **{**fixed, **sizes})


@published
def llama3_8b(**overrides: object) -> Shape:
    """LLaMA 3 8B (Grattafiori et al. 2024, arXiv 2407.21783)."""
    return _llama3(overrides, num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32)


@published
def llama3_70b(**overrides: object) -> Shape:
    """LLaMA 3 70B (Grattafiori et al. 2024, arXiv 2407.21783)."""
    return _llama3(overrides, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64)


def _llama31(overrides: dict[str, object], factor: float, **sizes: object) -> Shape:
    """LLaMA 3 with the frequency scaling and the context of 3.1 and 3.2."""
    return _llama3(overrides, **{"rope_scaling_factor": factor, "max_position_embeddings": 131072, **sizes})


@published
def llama31_8b(**overrides: object) -> Shape:
    """LLaMA 3.1 8B (Grattafiori et al. 2024, arXiv 2407.21783): as 3 8B, frequencies scaled by up to 8."""
    return _llama31(overrides, 8.0, num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32)


@published
def llama32_1b(**overrides: object) -> Shape:
    """LLaMA 3.2 1B (Meta 2024, config.json of meta-llama/Llama-3.2-1B): tied embeddings, heads of 64 channels."""
    sizes = {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32}
    return _llama31(overrides, 32.0, tie_embeddings=True, **sizes)


@published
def llama32_3b(**overrides: object) -> Shape:
    """LLaMA 3.2 3B (Meta 2024, config.json of meta-llama/Llama-3.2-3B): tied embeddings."""
    sizes = {"num_layers": 28, "hidden_size": 3072, "ffn_hidden_size": 8192, "num_attention_heads": 24}
    return _llama31(overrides, 32.0, tie_embeddings=True, **sizes)
