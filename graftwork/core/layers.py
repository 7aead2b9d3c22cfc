"""Norms and the fused norm+linear for machines without transformer-engine, under transformer-engine's parameter names.

State-dict keys, Hugging Face mappings and adapter targets are therefore the same on CPU and on GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

_SHARED = "graftwork_shared_norm"


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, zero_centered_gamma: bool, normalization: str
) -> Tensor:
    """Return LayerNorm or RMSNorm of ``x`` over its last dimension; gamma is ``weight + 1`` when zero-centered."""
    gamma = weight + 1 if zero_centered_gamma else weight
    if normalization == "RMSNorm":
        return F.rms_norm(x, gamma.shape, gamma, eps)
    return F.layer_norm(x, gamma.shape, gamma, bias, eps)


def normalized_input(linear: nn.Module, x: Tensor) -> Tensor:
    """Return what ``linear`` multiplies by its weight: the norm's output for a fused norm+linear, else ``x`` itself.

    Works for our LayerNormColumnParallelLinear and for transformer-engine's, which share these attribute names.
    """
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    shared: list[Tensor] | None = vars(linear).get(_SHARED)
    if shared and shared[0] is x:
        return shared[1]
    made = normalize(
        x,
        weight,
        getattr(linear, "layer_norm_bias", None),
        eps=linear.eps,  # type: ignore[arg-type]
        zero_centered_gamma=linear.zero_centered_gamma,  # type: ignore[arg-type]
        normalization=linear.normalization,  # type: ignore[arg-type]
    )
    if shared is not None:
        shared[:] = [x, made]
    return made


@contextmanager
def shared_norm(linear: nn.Module) -> Iterator[None]:
    """Compute the norm of a fused norm+linear once inside the block, for all who ask for it with the same input."""
    if getattr(linear, "layer_norm_weight", None) is None:
        yield
        return
    vars(linear)[_SHARED] = []
    try:
        yield
    finally:
        del vars(linear)[_SHARED]


def _gamma(config: TransformerConfig, size: int | tuple[int, ...], device: torch.device | None) -> nn.Parameter:
    make = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    return _flagged(make(size, dtype=config.params_dtype, device=device), config)


def _beta(config: TransformerConfig, size: int | tuple[int, ...], device: torch.device | None) -> nn.Parameter:
    return _flagged(torch.zeros(size, dtype=config.params_dtype, device=device), config)


def _flagged(tensor: Tensor, config: TransformerConfig) -> nn.Parameter:
    """Mark a replicated parameter whose gradient is summed over tensor-parallel ranks under sequence parallelism."""
    parameter = nn.Parameter(tensor)
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


def _device(config: TransformerConfig) -> torch.device | None:
    if config.use_cpu_initialization or not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


class TorchNorm(nn.Module):
    """LayerNorm or RMSNorm with zero-centered gamma and sequence parallelism, unlike megatron-core's torch norm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.normalization = config.normalization
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.weight = _gamma(config, hidden_size, _device(config))
        self.bias = None if self.normalization == "RMSNorm" else _beta(config, hidden_size, _device(config))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        return normalize(
            x,
            self.weight,
            self.bias,
            eps=self.eps,
            zero_centered_gamma=self.zero_centered_gamma,
            normalization=self.normalization,
        )


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """A norm followed by a column-parallel linear, in one module: layer_norm_weight, layer_norm_bias, weight, bias."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.normalization = config.normalization
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.layer_norm_weight = _gamma(config, input_size, _device(config))
        if self.normalization == "RMSNorm":
            self.register_parameter("layer_norm_bias", None)
        else:
            self.layer_norm_bias = _beta(config, input_size, _device(config))

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, input_size] -> ([s, b, output_size / tp], bias or None); under sequence parallelism s is local."""
        return super().forward(normalized_input(self, input_), weight, runtime_gather_output)
