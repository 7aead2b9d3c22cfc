"""Random base weights that depend on seed and global name only: one model in every parallel layout."""

import hashlib
from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from graftwork.core.records import EMBEDDING
from graftwork.parallel.names import global_name
from graftwork.parallel.record import record_of
from graftwork.parallel.state import tp_rank, tp_size

LAST_OF_BLOCK = ("linear_proj.weight", "linear_fc2.weight")


def draw(chunks: Sequence[nn.Module], config: TransformerConfig, seed: int) -> None:
    """Redraw every weight matrix, as megatron-core does from N(0, init_method_std^2), whatever ranks hold it.

    megatron-core's own values follow its generators, which stand elsewhere on another pipeline stage or expert rank.
    """
    for chunk in chunks:
        for path, parameter in chunk.named_parameters():
            if parameter.ndim == 2:
                name = EMBEDDING if record_of(parameter).copy else global_name(chunk, path)
                _draw(parameter, name, _std(name, config), seed)


def _draw(parameter: nn.Parameter, name: str, std: float, seed: int) -> None:
    sharding = record_of(parameter).sharding
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
    full = torch.empty(sharding.shape, device=parameter.device).normal_(0.0, std, generator=generator)
    parameter.detach().copy_(sharding.take(full, tp_rank(), tp_size()))


def _std(name: str, config: TransformerConfig) -> float:
    """The last linear of a block starts smaller, by the square root of the number of residual branches."""
    return config.init_method_std / ((2 * config.num_layers) ** 0.5 if name.endswith(LAST_OF_BLOCK) else 1.0)
