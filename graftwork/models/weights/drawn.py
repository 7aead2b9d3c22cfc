"""Random base weights that depend on seed and global name only: one model in every parallel layout."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from graftwork.core.records import EMBEDDING
from graftwork.parallel.names import global_name
from graftwork.parallel.record import record_of
from graftwork.parallel.state import tp_rank, tp_size

LAST_OF_BLOCK = ("linear_proj.weight", "linear_fc2.weight")

Draw = Callable[[str, Tensor, torch.Generator], None]
"""Fills a whole weight matrix by its global name."""


def draw_all(chunks: Sequence[nn.Module], draw: Draw, seed: int) -> None:
    """Redraw every weight matrix, whatever ranks hold it.

    megatron-core's own values follow its generators, which stand elsewhere on another pipeline stage or expert rank.
    """
    for chunk in chunks:
        for path, parameter in chunk.named_parameters():
            if parameter.ndim == 2:
                name = EMBEDDING if record_of(parameter).copy else global_name(chunk, path)
                _draw(parameter, name, draw, seed)


def spread(config: TransformerConfig, name: str, full: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix as megatron-core does, from N(0, init_method_std^2).

    The last linear of a block starts smaller, by the square root of the number of residual branches.
    """
    last = name.endswith(LAST_OF_BLOCK)
    full.normal_(0.0, config.init_method_std / ((2 * config.num_layers) ** 0.5 if last else 1.0), generator=generator)


def _draw(parameter: nn.Parameter, name: str, draw: Draw, seed: int) -> None:
    sharding = record_of(parameter).sharding
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
    full = torch.empty(sharding.shape, device=parameter.device)
    draw(name, full, generator)
    parameter.detach().copy_(sharding.take(full, tp_rank(), tp_size()))
