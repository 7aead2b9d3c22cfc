"""Where the rows of our fused tensors go in a Hugging Face model, written from the formats alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from graftwork.models.shapes import Shape

Pieces = list[tuple[str, Tensor]]
"""(suffix of the Hugging Face module below its layer, row indices of our tensor)"""


def pieces(shape: Shape, site: str) -> Pieces:
    """Return the Hugging Face modules of one of our sites (name below its layer) and the output rows each owns."""
    if shape.family == "gpt2":
        return _gpt2(shape, site)
    names = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
    if site in names:
        return [(names[site], torch.arange(shape.hidden_size))]
    if site == "mlp.linear_fc1":
        up = torch.arange(shape.ffn_hidden_size)
        return [("mlp.gate_proj", up), ("mlp.up_proj", up + shape.ffn_hidden_size)]
    return [(f"self_attn.{name}_proj", rows) for name, rows in zip("qkv", qkv_rows(shape))]


def qkv_rows(shape: Shape) -> list[Tensor]:
    """Rows of q, of k and of v in the fused weight, laid out as [groups, heads / groups + 2, width]."""
    heads = shape.num_attention_heads // shape.groups
    rows = torch.arange(shape.groups * (heads + 2) * shape.channels).view(shape.groups, heads + 2, shape.channels)
    return [rows[:, :heads].reshape(-1), rows[:, heads].reshape(-1), rows[:, heads + 1].reshape(-1)]


def _gpt2(shape: Shape, site: str) -> Pieces:
    names = {"self_attention.linear_proj": "attn.c_proj", "mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj"}
    if site in names:
        width = shape.ffn_hidden_size if site == "mlp.linear_fc1" else shape.hidden_size
        return [(names[site], torch.arange(width))]
    return [("attn.c_attn", torch.cat(qkv_rows(shape)))]


def layer_prefix(shape: Shape, layer: int) -> str:
    """Return where Hugging Face keeps a layer."""
    return f"transformer.h.{layer}." if shape.family == "gpt2" else f"model.layers.{layer}."


def split(name: str) -> tuple[int, str]:
    """Split ``decoder.layers.3.mlp.linear_fc1`` into 3 and ``mlp.linear_fc1``."""
    _, _, layer, site = name.split(".", 3)
    return int(layer), site


def modules(shape: Shape, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (full Hugging Face module path, rows) of one of our global site names."""
    layer, site = split(name)
    for suffix, rows in pieces(shape, site):
        yield layer_prefix(shape, layer) + suffix, rows
