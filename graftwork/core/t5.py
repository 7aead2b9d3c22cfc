"""The one seam to megatron-core's T5Model: an encoder and a decoder with relative positions."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.T5 import T5Model
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import FunctionCtx

from graftwork.compat import cpu
from graftwork.core.built import finish
from graftwork.core.remembering import FixedMemory, GrowingMemory, RememberingCrossAttention, RememberingSelfAttention
from graftwork.core.specs import t5_block_specs
from graftwork.errors import ParallelismError
from graftwork.parallel.state import tp_rank, tp_size


class RelativeT5(T5Model):
    """megatron-core's T5Model with a way of its own through it: ``run`` instead of a call.

    Relative positions, padding and causality are one additive mask for all layers of a stack; each rank looks up the
    biases of its own heads. There is one output layer, without a bias, under the name that it has in a GPT model.
    """

    output_scale: float = 1.0
    """What the decoder's output is multiplied by before the output layer."""
    remembering: tuple[RememberingSelfAttention | RememberingCrossAttention, ...]
    """The decoder's attention modules, known from birth: an adapter around one takes it out of the module tree."""

    def __init__(self, **options: Any) -> None:
        super().__init__(position_embedding_type="relative", **options)
        del self.lm_head
        self.output_layer.register_parameter("bias", None)
        device = self.embedding.word_embeddings.weight.device
        self.encoder_relative_pos_emb.to(device)
        self.decoder_relative_pos_emb.to(device)
        kinds = RememberingSelfAttention | RememberingCrossAttention
        self.remembering = tuple(m for m in self.decoder.modules() if isinstance(m, kinds))

    def run(self, source: Tensor, source_lengths: Tensor, tokens: Tensor) -> Tensor:
        """Return logits [b, sd, v/tp] of decoder ids [b, sd] after right-padded source ids [b, se].

        With ``post_process`` switched off what the output layer would read, [sd(/tp), b, h].
        """
        context, padding = self.encode(source, source_lengths)
        hidden = self.decode(tokens, context, padding)
        return self.logits(hidden) if self.post_process else hidden

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder's output [se(/tp), b, h] and where the source is padding, bool [b, 1, 1, se]."""
        positions = torch.arange(source.shape[1], device=source.device)
        padding = (positions >= lengths[:, None])[:, None, None]
        bias = _forbid(padding, _biases(self.encoder_relative_pos_emb, positions, positions))
        hidden = self.embedding(source, None)
        hidden, bias = _collected(self.encoder, hidden, bias)
        output: Tensor = self.encoder(hidden, attention_mask=None, attention_bias=bias)
        return output, padding

    def decode(self, tokens: Tensor, context: Tensor, padding: Tensor, start: int = 0) -> Tensor:
        """Return what the output layer reads [n(/tp), b, h] at ids [b, n], which follow ``start`` remembered ids."""
        keys = torch.arange(start + tokens.shape[1], device=tokens.device)
        future = keys > keys[start:, None]
        bias = _forbid(future, _biases(self.decoder_relative_pos_emb, keys[start:], keys))
        hidden = self.embedding(tokens, None)
        hidden, bias = _collected(self.decoder, hidden, bias)
        output: Tensor = self.decoder(
            hidden, attention_mask=None, context=context, context_mask=padding, attention_bias=bias
        )
        return output if self.output_scale == 1.0 else output * self.output_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [b, s, v/tp] of what ``decode`` returns [s(/tp), b, h]."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits: Tensor = self.output_layer(hidden, weight=weight)[0]
        return logits.transpose(0, 1).contiguous()


def build_t5(
    config: TransformerConfig,
    *,
    vocab_size: int,
    real_vocab_size: int | None = None,
    num_encoder_layers: int,
    relative_attention_num_buckets: int = 32,
    relative_attention_max_distance: int = 128,
    share_embeddings_and_output_weights: bool,
    scale_output: bool = False,
) -> RelativeT5:
    """Build the whole model; ``config`` is the decoder's, ``vocab_size`` already padded, logits stay cut.

    real_vocab_size is the vocabulary without padding (None: there is none); scale_output divides what the output layer
    reads by the root of the hidden size. Raises ParallelismError where layers or sequences are divided over ranks.
    """
    for field in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(config, field) > 1:
            raise ParallelismError(f"{field}={getattr(config, field)} cannot divide an encoder-decoder; 1 is valid.")
    encoder_config = copy.copy(config)
    encoder_config.num_layers = num_encoder_layers
    encoder, decoder = t5_block_specs(num_encoder_layers, config)
    with cpu.tensors_stay_on_cpu():
        model = RelativeT5(
            config=config,
            encoder_config=encoder_config,
            transformer_encoder_layer_spec=encoder,
            transformer_decoder_layer_spec=decoder,
            vocab_size=vocab_size,
            max_sequence_length=0,  # relative positions need none
            share_embeddings_and_output_weights=share_embeddings_and_output_weights,
            relative_attention_num_buckets=relative_attention_num_buckets,
            relative_attention_max_distance=relative_attention_max_distance,
        )
    model.output_scale = config.hidden_size**-0.5 if scale_output else 1.0
    finish(model, config, vocab_size if real_vocab_size is None else real_vocab_size)
    return model


class DecoderCache:
    """Reads a decoder's tokens once: the source is encoded on entry, keys and values stay. Use as a context manager.

    ``source`` [b, se] is right-padded, ``source_lengths`` [b]; ``room`` is the number of decoder tokens, with the start
    token. All rows stand at the same position. Sequence parallelism has no cache.
    """

    def __init__(self, chunk: RelativeT5, source: Tensor, source_lengths: Tensor, room: int) -> None:
        self.chunk, self.room, self.length = chunk, room, 0
        self._source, self._lengths = source, source_lengths

    def __enter__(self) -> "DecoderCache":
        self._context, self._padding = self.chunk.encode(self._source, self._lengths)
        for attention in self.chunk.remembering:
            grows = isinstance(attention, RememberingSelfAttention)
            attention.memory = GrowingMemory(self.room) if grows else FixedMemory()
        return self

    def __exit__(self, *_: object) -> None:
        for attention in self.chunk.remembering:
            attention.memory = None

    def read(self, tokens: Tensor) -> Tensor:
        """Read the next ids [b, n] of every row and return the logits [b, v/tp] after the last one."""
        hidden = self.chunk.decode(tokens, self._context, self._padding, self.length)
        self.length += tokens.shape[1]
        return self.chunk.logits(hidden[-1:])[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; a row named twice is held twice from here on."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self._context.device)
        self._context = self._context.index_select(1, chosen)
        self._padding = self._padding.index_select(0, chosen)
        for attention in self.chunk.remembering:
            assert attention.memory is not None
            attention.memory.keep(chosen)


def _biases(table: RelativePositionEmbedding, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the biases [1, heads/tp, q, k] between query and key positions, of this rank's heads."""
    buckets = table._relative_position_bucket(
        keys - queries[:, None],
        bidirectional=table.bidirectional,
        num_buckets=table.relative_attention_num_buckets,
        max_distance=table.relative_attention_max_distance,
    )
    # Only this rank's columns get a gradient here; the record says so, and they are summed over the ranks.
    mine = table.relative_attention_bias.weight.chunk(tp_size(), dim=1)[tp_rank()]
    return F.embedding(buckets, mine).permute(2, 0, 1).unsqueeze(0)


def _forbid(where: Tensor, bias: Tensor) -> Tensor:
    """Return an additive mask: ``bias``, the dtype's minimum where attention may not look."""
    return bias.masked_fill(where, torch.finfo(bias.dtype).min)


def _collected(stack: TransformerBlock, hidden: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return input and bias of a stack such that every layer's gradient reaches the bias also under recomputation.

    Each layer that is run again in the backward pass walks the graph of what it reads from outside on its own, and the
    second one finds it gone. So they meet a leaf, whose gradient goes on once the whole stack is done.
    """
    again = stack.config.recompute_granularity is not None and stack.training and torch.is_grad_enabled()
    if not (again and bias.requires_grad):
        return hidden, bias
    leaf = bias.detach().requires_grad_()
    return _Collect.apply(hidden, bias, leaf), leaf


class _Collect(torch.autograd.Function):
    """Hands a stack's input through; its backward pass comes last and takes along what the leaf has gathered."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, bias: Tensor, leaf: Tensor) -> Tensor:
        """Return ``hidden`` as it is."""
        ctx.leaf = leaf  # type: ignore[attr-defined]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradients of input and bias."""
        return gradient, ctx.leaf.grad, None  # type: ignore[attr-defined]
