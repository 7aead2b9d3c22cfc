"""The one seam to megatron-core's GPTModel."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Literal

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from graftwork.compat import cpu
from graftwork.core.built import finish
from graftwork.core.specs import gpt_block_spec
from graftwork.layout import refuse_silent_garbage


def build_gpt(
    config: TransformerConfig,
    *,
    vocab_size: int,
    real_vocab_size: int | None = None,
    max_sequence_length: int,
    position_embedding_type: Literal["rope", "learned_absolute"],
    rotary_base: float = 10000,
    rotary_percent: float = 1.0,
    rope_scaling_factor: float | None = None,
    share_embeddings_and_output_weights: bool,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build this pipeline stage's GPTModel; ``vocab_size`` is already padded, logits stay cut over tensor ranks.

    real_vocab_size is the vocabulary without padding (None: there is none); rope_scaling_factor is Llama 3's, None for
    none. Raises ParallelismError for a configuration that would train on garbage without an error.
    """
    refuse_silent_garbage(config)
    with cpu.tensors_stay_on_cpu(), _without_deprecation_log():
        model = GPTModel(
            config,
            gpt_block_spec(config, vp_stage=vp_stage),  # type: ignore[arg-type]  # one spec for each layer
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            position_embedding_type=position_embedding_type,
            rotary_base=rotary_base,  # type: ignore[arg-type]  # annotated int, but any base is right
            rotary_percent=rotary_percent,
            rope_scaling=rope_scaling_factor is not None,
            rope_scaling_factor=8.0 if rope_scaling_factor is None else rope_scaling_factor,
            share_embeddings_and_output_weights=share_embeddings_and_output_weights,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
    finish(model, config, vocab_size if real_vocab_size is None else real_vocab_size)
    return model


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
