"""The record of every base parameter, set where its module is built, from its name and megatron-core's attributes."""

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from graftwork.parallel.names import in_expert
from graftwork.parallel.record import Record, note
from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import tp_size

EMBEDDING = "embedding.word_embeddings.weight"
VOCABULARY = (EMBEDDING, "output_layer.weight")
OF_HEADS = ("q_layernorm", "k_layernorm", "relative_attention_bias")
"""Replicated, but each tensor-parallel rank uses them for its own heads only."""


def note_base(chunk: nn.Module, config: TransformerConfig, vocab_size: int) -> None:
    """Set the record of every parameter of a freshly built chunk; ``vocab_size`` is the real, un-padded vocabulary."""
    for name, parameter in chunk.named_parameters():
        flagged = bool(getattr(parameter, "sequence_parallel", False))
        record = Record(
            sharding=_sharding(name, parameter, config, vocab_size),
            # megatron-core marks experts only when they are spread over ranks, but with whole experts on every tensor
            # rank (expert tensor parallel size 1) each of those ranks has a partial gradient too.
            expert=in_expert(name),
            partial=flagged or any(part in name for part in OF_HEADS),
            copy=bool(getattr(parameter, "shared", False)),
        )
        note(parameter, record)


def _sharding(name: str, parameter: nn.Parameter, config: TransformerConfig, vocab_size: int) -> Sharding:
    shape = list(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False) or in_expert(name):
        return Sharding(tuple(shape))
    dim = int(getattr(parameter, "partition_dim", 0))
    shape[dim] *= tp_size()
    if name in VOCABULARY:
        return Sharding((vocab_size, *shape[1:]), dim, padded=shape[0])
    gated = "linear_fc1" in name and config.gated_linear_unit
    return Sharding(tuple(shape), dim, blocks=2 if gated else 1)
