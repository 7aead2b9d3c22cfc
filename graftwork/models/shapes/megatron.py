"""Shape -> megatron-core's TransformerConfig."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import graftwork.compat  # noqa: F401  (accommodations must precede any megatron import)
from graftwork.errors import ConfigError, suggest
from graftwork.layout import Layout

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from graftwork.models.shapes.shape import Shape


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation (GPT-2's ``gelu_new``)."""
    return F.gelu(x, approximate="tanh")


def transformer_config(shape: "Shape", **parallel: Any) -> "TransformerConfig":
    """Build the configuration of ``shape``; ``parallel`` sets any further TransformerConfig field.

    Raises ParallelismError when the parallel sizes do not fit the shape, ConfigError for an unknown field.
    """
    from megatron.core.transformer import TransformerConfig

    valid = [f.name for f in fields(TransformerConfig)]
    for name in parallel:
        if name not in valid:
            raise ConfigError(f"TransformerConfig has no field {name!r}; {suggest(name, valid)}")
    layout = Layout.among(parallel)
    layout.check_transformer(shape)
    given = {**_model_fields(shape), **_moe_fields(shape), **layout.transformer_fields(), **_run_fields(parallel)}
    given |= parallel
    if "cuda_graph_scope" in valid:
        given.setdefault("cuda_graph_scope", [])  # its default in 0.16 is deprecated and warns
    return TransformerConfig(**given)


def _model_fields(shape: "Shape") -> dict[str, Any]:
    same = (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization "
        "layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias qk_layernorm "
        "hidden_dropout attention_dropout"
    )
    named = {name: getattr(shape, name) for name in same.split()}
    return {**named, "gated_linear_unit": shape.gated, "activation_func": _activation(shape.activation)}


def _activation(name: str) -> Any:
    from megatron.core.activations import squared_relu

    return {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "squared_relu": squared_relu}[name]


def _moe_fields(shape: "Shape") -> dict[str, Any]:
    if shape.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": shape.num_moe_experts,
        "moe_router_topk": shape.moe_router_topk or 2,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size or shape.ffn_hidden_size,
        "moe_token_dispatcher_type": "alltoall",
    }


def _run_fields(parallel: dict[str, Any]) -> dict[str, Any]:
    dtype = parallel.get("params_dtype", torch.float32)
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "calculate_per_token_loss": True,
    }
