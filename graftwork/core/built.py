"""What every freshly built megatron-core model needs before weights are filled in: one dtype, marks, records."""

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from graftwork.core.records import note_base


def finish(model: nn.Module, config: TransformerConfig, vocab_size: int) -> None:
    """Give every parameter the configuration's dtype and its record; ``vocab_size`` is the real vocabulary."""
    _in_one_dtype(model, config.params_dtype)
    _mark_cut_weights(model)
    note_base(model, config, vocab_size)


def _in_one_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter ``dtype``: megatron-core makes learned positions in fp32, which the first norm refuses."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _mark_cut_weights(model: nn.Module) -> None:
    """Set megatron-core's tensor-parallel attributes on every cut weight: it does so only where it draws values too."""
    dimensions = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        dimension = next((d for kind, d in dimensions.items() if isinstance(layer, kind)), None)
        if weight is not None and dimension is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dimension, 1)
