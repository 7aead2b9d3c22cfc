"""GPT: a decoder-only megatron-core model as a LightningModule."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from graftwork import parallel
from graftwork.batch import Batch, Ids
from graftwork.core.context_parallel import slice_batch
from graftwork.core.gpt import build_gpt
from graftwork.errors import ConfigError
from graftwork.models.base import Model
from graftwork.models.generation.logits import masked_logits
from graftwork.models.recompute import start_gradients


class GPT(Model):
    """A GPT-style model (GPT-2/3, LLaMA, Nemotron, SmolLM2, ...) over megatron-core's GPTModel.

    The arguments are those of ``Model``.
    """

    def build_chunk(self, config: TransformerConfig, vp_stage: int | None) -> nn.Module:
        """Return the GPTModel of one (virtual) pipeline stage, its weights not yet filled."""
        first, last = parallel.is_first_stage(vp_stage), parallel.is_last_stage(vp_stage)
        arguments = self.shape.gpt_arguments(parallel.tp_size())
        chunk = build_gpt(config, pre_process=first, post_process=last, vp_stage=vp_stage, **arguments)
        if first and self._starts_gradients:
            chunk.embedding.register_forward_hook(start_gradients)
        return chunk

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits [b, s, vocab_size] of token ids [b, s] (virtual ids included).

        ``attention_mask`` [b, s] is 1 on tokens, 0 on padding on either side, as in transformers; positions count from
        the first token. Logits at padding are zero.
        """
        self.configure_model()
        return masked_logits(self, input_ids, attention_mask)

    def run_chunk(self, chunk: nn.Module, batch: Batch) -> Tensor:
        """Call one megatron-core chunk on a microbatch: logits [b, s, v/tp], or hidden states before the last stage.

        A packed microbatch lies in one line; under context parallelism only this rank's positions are in it. Raises
        ConfigError for rows longer than the model's positions reach.
        """
        packed = None if batch.cu_seqlens is None else _packed(batch.cu_seqlens)
        self._check_length(batch.tokens.shape[1] * parallel.cp_size() if packed is None else packed.max_seqlen_q)
        with self.stack.routed(batch.routes):
            output: Tensor = chunk(
                input_ids=batch.tokens,
                position_ids=batch.position_ids,
                attention_mask=None,
                packed_seq_params=packed,
            )
        return output

    def lay_out(self, prompts: Ids, answers: Ids, device: torch.device) -> Batch:
        """Return rows of a prompt and its answer, whose tokens are the targets."""
        return Batch.following(prompts, answers, device)

    def local(self, batch: Batch) -> Batch:
        """Return a microbatch with packed rows in one line, and only this context-parallel rank's positions."""
        return slice_batch(batch.in_one_line() if batch.packed else batch)

    def _check_length(self, length: int) -> None:
        limit = self.shape.max_position_embeddings
        if length > limit:
            raise ConfigError(
                f"a row of {length} tokens, virtual ones included, is longer than the model's context "
                f"(max_position_embeddings={limit}); set data.seq_length to at most {limit}, or give shorter rows."
            )


def _packed(cu_seqlens: Tensor) -> PackedSeqParams:
    """Return megatron-core's description of packed rows with boundaries ``cu_seqlens`` int32 [n + 1]."""
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
