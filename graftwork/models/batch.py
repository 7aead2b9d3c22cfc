"""Batches in megatron-core's form: packed rows in one line, padding on the right, context-parallel slices."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftwork.core.segments import local_positions
from graftwork.errors import ParallelismError
from graftwork.parallel.state import cp_rank, cp_size

BY_POSITION = ("tokens", "labels", "position_ids")


@dataclass(frozen=True)
class RightPadded:
    """Rows with their padding moved to the right, where causal attention never sees it, and the way back."""

    tokens: Tensor
    places: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None) -> "RightPadded":
        """Move the padding of [b, s] ids (mask 0) behind the tokens; padding becomes id 0."""
        if attention_mask is None or bool(attention_mask.all()):
            return cls(input_ids, None, None)
        mask = attention_mask.bool()
        order = torch.argsort((~mask).int(), dim=1, stable=True)
        tokens = torch.gather(input_ids.masked_fill(~mask, 0), 1, order)
        return cls(tokens, torch.argsort(order, dim=1), mask)

    def restore(self, logits: Tensor) -> Tensor:
        """Bring logits [b, s, v] back to the places of ``input_ids``; padding gets zeros."""
        if self.places is None or self.mask is None:
            return logits
        index = self.places.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        return torch.gather(logits, 1, index) * self.mask.unsqueeze(-1)


def positions(tokens: Tensor) -> Tensor:
    """Return position ids 0..s-1 for ids [b, s]."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def flatten_packed(batch: dict[str, Any]) -> dict[str, Any]:
    """Lay the packed rows [b, s] of a microbatch in one line [1, b * s] with one list of boundaries."""
    if cp_size() > 1:
        raise ParallelismError("packing with context_parallel_size > 1 is not supported; set data.packing=False.")
    rows, length = batch["tokens"].shape
    starts = torch.arange(rows, device=batch["cu_seqlens"].device).unsqueeze(1) * length
    bounds = torch.unique((batch["cu_seqlens"] + starts).reshape(-1))
    flat = {key: batch[key].reshape(1, -1) for key in BY_POSITION}
    return {**batch, **flat, "cu_seqlens": bounds.to(torch.int32)}


def context_slice(batch: dict[str, Any]) -> dict[str, Any]:
    """Return this context-parallel rank's zig-zag part of every per-position tensor [b, s]."""
    if cp_size() == 1:
        return {k: v for k, v in batch.items() if k != "cu_seqlens"}
    keep = local_positions(batch["tokens"].shape[1], cp_rank(), cp_size()).to(batch["tokens"].device)
    return {k: v.index_select(1, keep) if k in BY_POSITION else v for k, v in batch.items() if k != "cu_seqlens"}
