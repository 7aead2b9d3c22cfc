"""T5: an encoder-decoder megatron-core model as a LightningModule."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from graftwork import parallel
from graftwork.batch import IGNORED, Batch, Ids
from graftwork.core.t5 import RelativeT5, build_t5
from graftwork.errors import ConfigError
from graftwork.models.base import Model
from graftwork.models.generation.logits import RightPadded, gather_vocabulary
from graftwork.models.recompute import start_gradients
from graftwork.models.shape import Shape
from graftwork.models.t5_shape import T5Shape
from graftwork.models.weights.drawn import Draw
from graftwork.parallel.fused import QKVRows
from graftwork.peft.sites import Host


class T5(Model):
    """A T5-style model (T5 1.0 and 1.1, Flan-T5, mT5, ...) over megatron-core's T5Model.

    The arguments are those of ``Model``, the shape a T5Shape. The encoder reads the prompt, the decoder the answer.
    """

    kind: ClassVar[str] = "t5"
    seq2seq: ClassVar[bool] = True

    @property
    def sizes(self) -> T5Shape:
        """The model's shape as what it is."""
        assert isinstance(self.shape, T5Shape)
        return self.shape

    def build_chunk(self, config: TransformerConfig, vp_stage: int | None) -> nn.Module:
        """Return the whole T5 model, its weights not yet filled."""
        chunk = build_t5(config, **self.sizes.t5_arguments(parallel.tp_size()))
        if self._starts_gradients:
            chunk.embedding.register_forward_hook(start_gradients)
        return chunk

    def draw(self) -> Draw:
        """Return T5's own spread of random weights."""
        return partial(_draw, self.sizes)

    def host(self) -> Host:
        """Describe the model to transforms, with the number of layers of each stack."""
        return replace(super().host(), depths={"encoder": self.sizes.num_layers, "decoder": self.sizes.decoder_layers})

    def lay_out(self, prompts: Ids, answers: Ids, device: torch.device) -> Batch:
        """Return prompts for the encoder; for the decoder the start token and the answers, which are the targets."""
        return Batch.answering(prompts, answers, self.sizes.decoder_start_token_id, device)

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits [b, sd, vocab_size] of decoder ids [b, sd] after the encoder's ids [b, se] (virtual ones too).

        The masks are 1 on tokens, 0 on padding on either side, as in transformers; logits at padding are zero.
        """
        self.configure_model()
        source = RightPadded.of(input_ids, attention_mask)
        read = RightPadded.of(decoder_input_ids, decoder_attention_mask)
        whole = torch.full_like(input_ids[:, 0], input_ids.shape[1])
        lengths = whole if attention_mask is None else attention_mask.sum(1)
        batch = replace(Batch.of(read.tokens), source=source.tokens, source_lengths=lengths)
        logits = gather_vocabulary(self.run_chunk(self.chunks[0], self.local(batch)))
        return read.restore(logits[:, : read.tokens.shape[1], : self.shape.vocab_size])

    def run_chunk(self, chunk: nn.Module, batch: Batch) -> Tensor:
        """Call the model on a microbatch: logits [b, sd, v/tp].

        Raises ConfigError for a batch without a source, or a packed one.
        """
        assert isinstance(chunk, RelativeT5)
        if batch.source is None or batch.source_lengths is None:
            raise ConfigError("an encoder-decoder needs a batch with a source: lay it out with model.lay_out(...).")
        if batch.packed:
            raise ConfigError("rows of an encoder-decoder cannot be packed: set data.packing=False.")
        with self.stack.routed(batch.routes):
            return chunk.run(batch.source, batch.source_lengths, batch.tokens)

    def local(self, batch: Batch) -> Batch:
        """Pad source and tokens so that sequence parallelism can cut them in equal parts."""
        if not self.config.sequence_parallel or batch.source is None:
            return batch
        more = -batch.tokens.shape[1] % parallel.tp_size()
        return replace(
            batch,
            source=F.pad(batch.source, (0, -batch.source.shape[1] % parallel.tp_size())),
            tokens=F.pad(batch.tokens, (0, more)),
            labels=F.pad(batch.labels, (0, more), value=IGNORED),
            position_ids=F.pad(batch.position_ids, (0, more)),
        )


def _draw(shape: Shape, name: str, full: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix as T5 does, each by its number of inputs; queries are smaller, as their scores are not scaled."""
    inputs = full.shape[1]
    if "word_embeddings" in name:
        full.normal_(0.0, 1.0, generator=generator)
        return
    if "relative_attention_bias" in name or name.endswith("output_layer.weight"):
        inputs = shape.hidden_size
    full.normal_(0.0, inputs**-0.5, generator=generator)
    if name.endswith("linear_q.weight"):
        full.mul_(shape.channels**-0.5)
    if name.endswith("linear_qkv.weight"):
        rows = QKVRows(shape.num_attention_heads, shape.groups, shape.channels)
        query, key, value = rows.split(full)
        full.copy_(rows.join(query * shape.channels**-0.5, key, value))
