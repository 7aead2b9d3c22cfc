"""The models of the matrix, not yet built: weights from a checkpoint, or random ones."""

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwork import parallel
from graftwork.models import GPT
from graftwork.models.shapes import Shape
from graftwork.models.weights import read_config, shape_from_hf
from graftwork.parallel.record import record_of
from graftwork.parallel.sharding import Sharding
from tests.contracts.methods import STACKS
from tests.helpers.tiny_gpt import global_name
from tests.helpers.tiny_hf import make_tiny
from tests.parallel.layouts import Cell

MIXTURE = Shape(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=61,
    max_position_embeddings=64,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
)
CHECKPOINTS = ("llama", "gpt2", "qwen3")


class Lively(GPT):
    """A GPT of random weights, four times as wide as usual, so that layers and experts differ visibly."""

    def configure_model(self) -> None:
        """Build, then scale the base's weights, not its norms."""
        fresh = self.module is None
        super().configure_model()
        for parameter in self.parameters() if fresh else ():
            if parameter.ndim == 2 and record_of(parameter).owner is None:
                parameter.data.mul_(4.0)


def write_checkpoints(root: Path) -> Path:
    """Write the tiny Hugging Face checkpoints below ``root``; their vocabulary has 101 words, padded at TP2."""
    for family in CHECKPOINTS:
        make_tiny(family, root / family)
    return root


def model_of(cell: Cell, root: Path) -> GPT:
    """Return the cell's model with its adapters queued."""
    if cell.base == "mixture":
        model: GPT = Lively(MIXTURE, dtype="fp32", recompute=cell.recompute)
    else:
        directory = root / cell.base
        shape = shape_from_hf(read_config(directory))
        model = GPT(shape, checkpoint=str(directory), dtype="fp32", recompute=cell.recompute)
    if cell.subject in STACKS:
        model.add_adapter(STACKS[cell.subject]())
    return model


def shake(model: GPT) -> None:
    """Move every adapter value by noise drawn from its global name, so that no zero hides a gradient."""
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if ".adapters." in name:
                parameter.data.add_(_drawn(global_name(chunk, name), record_of(parameter).sharding, 0.02))


def prompt_of(model: Any) -> list[int]:
    """Return the virtual tokens of every attached prompt."""
    return [i for slot in model.prompt_layout.slots for i in slot.ids]


def _drawn(key: str, sharding: Sharding, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    full = torch.randn(sharding.shape, generator=generator) * std
    return sharding.take(full, parallel.tp_rank(), parallel.tp_size())
