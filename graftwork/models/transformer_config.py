"""megatron-core's TransformerConfig of a model shape in a parallel layout."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from graftwork.errors import ConfigError, suggest
from graftwork.layout import Dimensions, Layout


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (GPT-2's ``gelu_new``)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu_tanh": gelu_tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "squared_relu": squared_relu,
}
"""What the MLP applies, by the name that a shape gives it; a gate is the shape's own business."""


def transformer_config(
    shape: Dimensions, model: Mapping[str, object], given: Mapping[str, object]
) -> TransformerConfig:
    """Build the configuration of ``shape``: its own TransformerConfig fields ``model``, and ``given`` on top.

    Raises ParallelismError when the parallel sizes in ``given`` do not fit the shape, ConfigError for an unknown field.
    """
    valid = [f.name for f in fields(TransformerConfig)]
    for name in given:
        if name not in valid:
            raise ConfigError(f"TransformerConfig has no field {name!r}; {suggest(name, valid)}")
    layout = Layout.among(given)
    layout.check_transformer(shape)
    merged = {**model, **layout.transformer_fields(), **_run_fields(given), **given}
    if "cuda_graph_scope" in valid:
        merged.setdefault("cuda_graph_scope", [])  # its default in 0.16 is deprecated and warns
    merged.setdefault("bias_activation_fusion", _is_swiglu(merged))
    with warnings.catch_warnings():
        # what 0.19 says of every selective recomputation, where there is no Transformer Engine either
        warnings.filterwarnings("ignore", message="If you are using transformer_engine as the")
        # the router multiplies in the model's dtype, as transformers' does
        warnings.filterwarnings("ignore", message="Using a large number of experts")
        return TransformerConfig(**merged)


def _is_swiglu(fields: Mapping[str, object]) -> bool:
    """Tell whether the MLP has the one gate whose gradient is made in one piece."""
    return bool(fields.get("gated_linear_unit")) and fields.get("activation_func") is F.silu


def _run_fields(given: Mapping[str, object]) -> dict[str, object]:
    dtype = given.get("params_dtype", torch.float32)
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "calculate_per_token_loss": True,
    }
