"""Random base weights that depend on seed and global name only: one model in every parallel layout."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.compat.names import global_name
from graftwork.compat.parallel import tp_rank, tp_size
from graftwork.compat.sharding import Sharding

EMBEDDING = "embedding.word_embeddings.weight"
VOCABULARY = (EMBEDDING, "output_layer.weight")
LAST_OF_BLOCK = ("linear_proj.weight", "linear_fc2.weight")


def draw(chunks: Sequence[nn.Module], seed: int, vocab_size: int) -> None:
    """Redraw every weight matrix, as megatron-core does from N(0, init_method_std^2), whatever ranks hold it.

    megatron-core's own values follow its generators, which stand elsewhere on another pipeline stage or expert rank.
    """
    for chunk in chunks:
        for path, parameter in chunk.named_parameters():
            if parameter.ndim == 2:
                tied = getattr(parameter, "shared", False)  # the last stage's copy of a tied embedding
                _draw(parameter, EMBEDDING if tied else global_name(chunk, path), chunk.config, seed, vocab_size)


def _draw(parameter: nn.Parameter, name: str, config: Any, seed: int, vocab_size: int) -> None:
    sharding = _sharding(parameter, name, config, vocab_size)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
    full = torch.empty(sharding.shape, device=parameter.device).normal_(0.0, _std(name, config), generator=generator)
    parameter.detach().copy_(sharding.take(full, tp_rank(), tp_size()))


def _std(name: str, config: Any) -> float:
    """The last linear of a block starts smaller, by the square root of the number of residual branches."""
    return config.init_method_std / ((2 * config.num_layers) ** 0.5 if name.endswith(LAST_OF_BLOCK) else 1.0)


def _sharding(parameter: Tensor, name: str, config: Any, vocab_size: int) -> Sharding:
    """Read the layout from megatron-core's attributes; experts are whole on every tensor-parallel rank."""
    shape = list(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False) or ".experts." in name:
        return Sharding(tuple(shape))
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    shape[dim] *= tp_size()
    if name in VOCABULARY:
        return Sharding((vocab_size, *shape[1:]), dim, padded=shape[0])
    gated = "linear_fc1" in name and config.gated_linear_unit
    return Sharding(tuple(shape), dim, blocks=2 if gated else 1)
