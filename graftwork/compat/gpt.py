"""The one seam to megatron-core's GPTModel."""

import contextlib
import logging
from collections.abc import Iterator

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from graftwork.compat import cpu
from graftwork.compat.specs import gpt_block_spec
from graftwork.errors import ParallelismError


def build_gpt(
    config: TransformerConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
    position_embedding_type: str,
    rotary_base: float = 10000,
    rotary_percent: float = 1.0,
    rope_scaling_factor: float | None = None,
    share_embeddings_and_output_weights: bool,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build this pipeline stage's GPTModel; ``vocab_size`` is already padded, logits stay cut over tensor ranks.

    position_embedding_type is "rope" or "learned_absolute"; rope_scaling_factor is Llama 3's, None for none. Raises
    ParallelismError for a configuration that would train on garbage without an error.
    """
    refuse_silent_garbage(config)
    with cpu.tensors_stay_on_cpu(), _without_deprecation_log():
        model = GPTModel(
            config,
            gpt_block_spec(config, vp_stage=vp_stage),
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            position_embedding_type=position_embedding_type,
            rotary_base=rotary_base,
            rotary_percent=rotary_percent,
            rope_scaling=rope_scaling_factor is not None,
            rope_scaling_factor=8.0 if rope_scaling_factor is None else rope_scaling_factor,
            share_embeddings_and_output_weights=share_embeddings_and_output_weights,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
    mark_cut_weights(model)
    return model


def mark_cut_weights(model: nn.Module) -> None:
    """Set megatron-core's tensor-parallel attributes on every cut weight: it does so only where it draws values too."""
    dimensions = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        dimension = next((d for kind, d in dimensions.items() if isinstance(layer, kind)), None)
        if weight is not None and dimension is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dimension, 1)


def refuse_silent_garbage(config: TransformerConfig) -> None:
    """Raise ParallelismError for what megatron-core accepts but computes wrongly, naming the field."""
    stages, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if config.num_moe_experts is not None and config.expert_tensor_parallel_size != 1:
        raise ParallelismError(
            f"expert_tensor_parallel_size={config.expert_tensor_parallel_size} must be 1: experts are never cut over "
            "tensor-parallel ranks here; spread them with expert_model_parallel_size."
        )
    if stages == 2 and virtual is not None and not (config.overlap_p2p_comm and not config.batch_p2p_comm):
        raise ParallelismError(
            "virtual_pipeline_model_parallel_size with pipeline_model_parallel_size=2 needs overlap_p2p_comm=True and "
            "batch_p2p_comm=False: batched messages between two interleaved stages mix up what they carry."
        )
    sent = torch.float32 if config.fp32_residual_connection else config.params_dtype
    if stages > 1 and config.pipeline_dtype != sent:
        raise ParallelismError(
            f"pipeline_dtype={config.pipeline_dtype} must be {sent}, the dtype of the activations between "
            "stages: the receiving stage would read other numbers."
        )


@contextlib.contextmanager
def _without_deprecation_log() -> Iterator[None]:
    """Silence one message of megatron-core 0.19 ("GPTModel IS DEPRECATED"), which a user can do nothing about."""

    def keep(record: logging.LogRecord) -> bool:
        return "DEPRECATED" not in record.getMessage()

    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
