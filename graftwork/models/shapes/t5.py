"""T5, T5 1.1 and mT5: RMSNorm, no biases, relative positions; heads of 64 channels (128 in T5's largest two)."""

from graftwork.models.shape import Shape
from graftwork.models.shapes.published import ShapeFunction, made, published
from graftwork.models.t5_shape import T5Shape

PAPER = "Raffel et al. 2020, arXiv 1910.10683"
SIZES_1_0: dict[str, tuple[int, int, int, int, int]] = {
    "small": (6, 512, 2048, 8, 64),
    "base": (12, 768, 3072, 12, 64),
    "large": (24, 1024, 4096, 16, 64),
    "3b": (24, 1024, 16384, 32, 128),
    "11b": (24, 1024, 65536, 128, 128),
}
"""T5 1.0: layers of each stack, hidden size, MLP width, heads, channels of a head."""
SIZES_1_1: dict[str, tuple[int, int, int, int, int]] = {
    "small": (8, 512, 1024, 6, 64),
    "base": (12, 768, 2048, 12, 64),
    "large": (24, 1024, 2816, 16, 64),
    "xl": (24, 2048, 5120, 32, 64),
    "xxl": (24, 4096, 10240, 64, 64),
}
"""T5 1.1 and mT5."""


def _named(name: str, told: str, sizes: tuple[int, int, int, int, int], **same: object) -> ShapeFunction:
    """Return the shape function ``name``."""
    layers, hidden, ffn, heads, channels = sizes
    numbers = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads}
    # As in every shape, a head width that follows from other sizes goes on following them.
    width = {} if channels * heads == hidden else {"kv_channels": channels}
    values = {**numbers, **width, "hidden_dropout": 0.1, "attention_dropout": 0.1, **same}

    def function(**overrides: object) -> Shape:
        return made(T5Shape, values, overrides)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = told
    return published(function)


def _t5(size: str) -> ShapeFunction:
    told = f"T5 {size} ({PAPER}): ReLU, tied embeddings with a scaled output."
    return _named(f"t5_{size}", told, SIZES_1_0[size], family="t5", vocab_size=32128)


def _t5v11(size: str) -> ShapeFunction:
    told = f"T5 1.1 {size} ({PAPER}; its authors' second release), Flan-T5's too: gated GELU, untied."
    return _named(f"t5v11_{size}", told, SIZES_1_1[size], family="t5", vocab_size=32128, **GATED)


def _mt5(size: str) -> ShapeFunction:
    told = f"mT5 {size} (Xue et al. 2021, arXiv 2010.11934): T5 1.1 over 101 languages."
    return _named(f"mt5_{size}", told, SIZES_1_1[size], family="mt5", vocab_size=250112, **GATED)


GATED: dict[str, object] = {"activation": "geglu_tanh", "tie_embeddings": False}

t5_small, t5_base, t5_large, t5_3b, t5_11b = (_t5(size) for size in SIZES_1_0)
t5v11_small, t5v11_base, t5v11_large, t5v11_xl, t5v11_xxl = (_t5v11(size) for size in SIZES_1_1)
mt5_small, mt5_base, mt5_large, mt5_xl, mt5_xxl = (_mt5(size) for size in SIZES_1_1)
