"""Activation recomputation: what each name means to megatron-core, and the gradients that it needs."""

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError, suggest

RECOMPUTE: dict[str, dict[str, object]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}
"""Fields of megatron-core's TransformerConfig by the name that a user gives."""


def recompute_fields(recompute: str | None) -> dict[str, object]:
    """Return the fields of ``recompute``, none for None; raises ConfigError for an unknown name."""
    if recompute is None:
        return {}
    if recompute not in RECOMPUTE:
        raise ConfigError(f"recompute is {recompute!r}; {suggest(str(recompute), RECOMPUTE)}")
    return RECOMPUTE[recompute]


def start_gradients(embedding: nn.Module, arguments: object, output: Tensor) -> Tensor:
    """Let gradients start at the embedding's output even when the embedding is frozen; a forward hook.

    Recomputation runs each layer inside an autograd function whose output needs gradients only if an *input* does;
    without this, full recomputation over a frozen embedding gives adapters no gradient at all.
    """
    wanted = embedding.training and torch.is_grad_enabled() and not output.requires_grad
    return output.requires_grad_(True) if wanted else output
