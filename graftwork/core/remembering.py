"""Attention that remembers keys and values between calls: a decoder reads each token once."""

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.typed_torch import apply_module
from torch import Tensor


class GrowingMemory:
    """Room for the keys and values [s, b, heads, d] of ``room`` positions; every call adds what is new."""

    def __init__(self, room: int) -> None:
        self.room, self.length = room, 0
        self._held: list[Tensor] = []

    def extend(self, new: Sequence[Tensor]) -> list[Tensor]:
        """Add keys and values of the next positions and return those of all positions so far."""
        if not self._held:
            self._held = [t.new_empty(self.room, *t.shape[1:]) for t in new]
        stop = self.length + new[0].shape[0]
        for held, tensor in zip(self._held, new, strict=True):
            held[self.length : stop] = tensor
        self.length = stop
        return [held[:stop] for held in self._held]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order."""
        self._held = [held.index_select(1, rows) for held in self._held]


class FixedMemory:
    """Keys and values that are computed in the first call and stay."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order."""
        if self.held is not None:
            key, value = self.held
            self.held = key.index_select(1, rows), value.index_select(1, rows)


class RememberingSelfAttention(SelfAttention):
    """Self-attention over what its ``memory`` holds and what is new; without one it is megatron-core's own."""

    memory: GrowingMemory | None = None

    def get_query_key_value_tensors(self, *args: Any, **options: Any) -> Any:
        """Return the new queries, and keys and values of all positions."""
        made: Any = super().get_query_key_value_tensors(*args, **options)
        return made if self.memory is None else (made[0], *self.memory.extend(made[1:]))


class RememberingCrossAttention(CrossAttention):
    """Cross-attention that computes keys and values once while it has a ``memory``."""

    memory: FixedMemory | None = None

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of ``hidden_states``, and keys and values of ``key_value_states``."""
        if self.memory is None or self.memory.held is None:
            query, key, value = super().get_query_key_value_tensors(hidden_states, key_value_states, *args, **options)
            if self.memory is not None:
                self.memory.held = key, value
            return query, key, value
        query, _ = apply_module(self.linear_q)(hidden_states)
        heads = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        return query.view(*query.shape[:-1], *heads), *self.memory.held
