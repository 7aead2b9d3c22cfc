"""Scaled-dot-product core attention for megatron-core: GQA, masks, packed rows, context parallelism, key/value cache.

megatron-core's local attention refuses attention bias, packed sequences and context parallelism, and builds the whole
[s, s] score matrix.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from graftwork.core.context_parallel import gather_rows
from graftwork.core.segments import Group, Segment, batches, runs, segments
from graftwork.errors import ConfigError

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class SDPACoreAttention(MegatronModule):
    """``core_attention`` of a megatron-core attention, on ``torch.nn.functional.scaled_dot_product_attention``.

    Boolean masks are True where attention is forbidden and broadcast to [b, 1, sq, sk]; unlike megatron-core's, a mask
    given to a causal attention is honoured together with causality. A query row that may see nothing gives zeros.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        if getattr(config, "window_size", None) is not None:
            raise ConfigError("sliding-window attention (window_size) is not available without transformer-engine.")
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = 1.0 / math.sqrt(config.kv_channels or 1) if softmax_scale is None else softmax_scale
        if config.apply_query_key_layer_scaling:
            self.scale /= max(1, layer_number)
        self.cp_group: ProcessGroup | None = getattr(pg_collection, "cp", None)
        if self.cp_group is None and config.context_parallel_size > 1:
            self.cp_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [sq, b, heads, d], key and value [sk, b, groups, d] -> [sq, b, heads * d]; packed: b is 1 or absent."""
        # In decode megatron-core passes no_mask to a causal layer; aligning to the end gives one query the same.
        causal = self.attn_mask_type in CAUSAL or attn_mask_type in CAUSAL

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if packed_seq_params is not None:
                return self._packed(q, k, v, packed_seq_params, causal)
            if self._cp_size > 1:
                return self._zigzag(q, k, v, attention_mask, attention_bias, causal)
            return self._row(q, k, v, attention_mask, attention_bias, causal)

        if self._again and torch.is_grad_enabled():
            found: Tensor = tensor_parallel.checkpoint(attend, False, query, key, value)
            return found
        return attend(query, key, value)

    @property
    def _cp_size(self) -> int:
        return 1 if self.cp_group is None else self.cp_group.size()

    @property
    def _cp_rank(self) -> int:
        return 0 if self.cp_group is None else self.cp_group.rank()

    @property
    def _again(self) -> bool:
        """Whether backward gathers the keys and values of all ranks, and attends, again.

        Kept from the forward pass they, and masks over them, would be the part of a layer's memory that more ranks do
        not make smaller. Where the layer itself is recomputed they are not kept anyway.
        """
        return self._cp_size > 1 and self.config.recompute_granularity is None

    def _gather(self, local: Tensor, row: list[Segment]) -> Tensor:
        return local if self.cp_group is None else gather_rows(local, row, self.cp_group)

    def _row(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool
    ) -> Tensor:
        """Attend over whole rows, queries being the last of the keys: [sq, b, heads, d] -> [sq, b, heads * d]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = self._attend(q, k, v, _allowed(q, k, mask, causal), bias, causal)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _zigzag(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool
    ) -> Tensor:
        """Attend from this rank's two chunks of every row to the keys of all ranks that each of them may see."""
        if mask is not None or bias is not None:
            raise ConfigError("a mask or a bias of the attention cannot be cut over context-parallel ranks.")
        whole = [Segment(0, key.shape[0] * self._cp_size)]
        key, value = (self._gather(t, whole) for t in (key, value))
        parts = [
            self._row(query[run.row : run.row + run.count], key[: run.keys], value[: run.keys], None, None, causal)
            for run in runs(whole, self._cp_rank, self._cp_size, causal)
        ]
        return torch.cat(parts)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams, causal: bool) -> Tensor:
        """Attend inside each segment only: [tokens, (1,) heads, d] -> [tokens, (1,) heads * d].

        A mask over the whole line would cost the square of its length. Instead segments of similar length are gathered
        from the line into a rectangle (``batches``), attend there as ordinary rows, and their real rows are put back;
        what belongs to no segment stays zero. Under context parallelism a rank holds some queries of every segment and
        fetches the keys and values of all of them.
        """
        row = segments(params.cu_seqlens_q, params.cu_seqlens_q_padded)
        q, k, v = (t.reshape(t.shape[0], *t.shape[-2:]) for t in (query, key, value))
        if self._cp_size > 1:
            k, v = (self._gather(t, row) for t in (k, v))
        rows, values = [], []
        for group in batches(row, self._cp_rank, self._cp_size, causal):
            rows.append(group.queries[group.real])
            values.append(self._attend_group(q, k, v, group, causal)[group.real])
        found = torch.cat(values)
        out = found.new_zeros(q.shape[0], *found.shape[1:]).index_copy(0, torch.cat(rows).to(q.device), found)
        return out.reshape(*query.shape[:-2], -1)

    def _attend_group(self, q: Tensor, k: Tensor, v: Tensor, group: Group, causal: bool) -> Tensor:
        """Return [n, mq, heads, d] for one group of runs."""
        qb, kb, vb = (t[i].transpose(1, 2) for t, i in ((q, group.queries), (k, group.keys), (v, group.keys)))
        plain = causal and group.square
        allowed = None if plain else group.allowed(causal)[:, None].to(q.device)
        return self._attend(qb, kb, vb, allowed, None, causal).transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None, causal: bool
    ) -> Tensor:
        """[b, heads, sq, d] with ``allowed`` True where attention may look; None: everything, or causal and square."""
        blind = None
        if allowed is not None:
            blind = ~allowed.any(-1, keepdim=True)
            allowed = allowed | blind
        if bias is not None:
            allowed = _biased(bias.to(q.dtype), allowed, q, k, causal)
        with self._dropout_state():
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=allowed,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal and allowed is None and q.shape[2] > 1,
                scale=self.scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        return out if blind is None else out.masked_fill(blind, 0.0)

    def _dropout_state(self) -> contextlib.AbstractContextManager[None]:
        """Heads are split over tensor-parallel ranks, so each rank draws its own mask (also true under its fork)."""
        if self.training and self.dropout > 0 and not self.config.sequence_parallel:
            forked: contextlib.AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
            return forked
        return contextlib.nullcontext()


def _allowed(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Return where attention may look, [b, 1, sq, sk] broadcastable, or None for plain causal or no restriction.

    The queries are the last ``sq`` positions of the keys.
    """
    sq, sk = q.shape[2], k.shape[2]
    plain = mask is None and sq in (1, sk)
    if plain or (mask is None and not causal):
        return None
    where = torch.arange(sk - sq, sk, device=q.device)
    allowed = None
    if mask is not None:
        allowed = ~(mask if mask.shape[-2] in (1, sq) else mask.index_select(-2, where))
    if causal:
        triangle = torch.arange(sk, device=q.device) <= where[:, None]
        allowed = triangle[None, None] if allowed is None else allowed & triangle
    return allowed


def _biased(bias: Tensor, allowed: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Return the additive mask: ``bias`` where attention may look, the dtype's minimum elsewhere."""
    if allowed is None and causal:
        sq, sk = q.shape[2], k.shape[2]
        allowed = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(sk - sq)
    return bias if allowed is None else bias.masked_fill(~allowed, torch.finfo(bias.dtype).min)
