"""Row layouts of fused linears: where queries, keys and values, or gate and up projection, stand in one weight.

One home for adapters that touch some of the rows and for the weight mappings.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QKVRows:
    """Rows of a fused qkv linear, viewed as [groups, heads / groups + 2, width]: each group's queries, key and value.

    ``heads``, ``groups``: of the whole model; a rank's part holds whole groups, so the methods take either.
    """

    heads: int
    groups: int
    width: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of rows of all queries, keys and values."""
        return self.heads * self.width, self.groups * self.width, self.groups * self.width

    @property
    def split_sizes(self) -> list[int]:
        """Heads of q, k and v in one group."""
        return [self.heads // self.groups, 1, 1]

    def join(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the fused rows [n, ...] of query, key and value rows, each [its rows, ...]."""
        groups = key.shape[0] // self.width
        parts = [t.reshape(groups, -1, self.width, *t.shape[1:]) for t in (query, key, value)]
        return torch.cat(parts, dim=1).flatten(0, 2)

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query, key and value rows of fused rows [n, ...]: the inverse of ``join``."""
        each = sum(self.split_sizes) * self.width
        grouped = fused.reshape(fused.shape[0] // each, sum(self.split_sizes), self.width, *fused.shape[1:])
        query, key, value = (part.flatten(0, 2) for part in grouped.split(self.split_sizes, dim=1))
        return query, key, value


@dataclass(frozen=True)
class KVRows:
    """Rows of a fused kv linear (cross-attention), viewed as [heads, 2, width]: each head's key and value."""

    heads: int
    width: int

    @property
    def counts(self) -> tuple[int, int]:
        """Number of rows of all keys and values."""
        return self.heads * self.width, self.heads * self.width

    def join(self, key: Tensor, value: Tensor) -> Tensor:
        """Return the fused rows [n, ...] of key and value rows, each [n / 2, ...]."""
        parts = [t.reshape(-1, 1, self.width, *t.shape[1:]) for t in (key, value)]
        return torch.cat(parts, dim=1).flatten(0, 2)

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key and value rows of fused rows [n, ...]: the inverse of ``join``."""
        key, value = fused.reshape(-1, 2, self.width, *fused.shape[1:]).unbind(1)
        return key.flatten(0, 1), value.flatten(0, 1)


@dataclass(frozen=True)
class GatedRows:
    """Rows of a gated fc1: gate above up; each tensor-parallel rank holds [gate_i; up_i] of its own channels."""

    channels: int

    @staticmethod
    def join(gate: Tensor, up: Tensor) -> Tensor:
        """Return [gate; up] of two halves [channels, ...]."""
        return torch.cat([gate, up])

    @staticmethod
    def split(fused: Tensor) -> tuple[Tensor, Tensor]:
        """Return (gate, up): the inverse of ``join``."""
        gate, up = fused.chunk(2)
        return gate, up


@dataclass(frozen=True)
class Parts:
    """The rows of a fused linear, viewed as [groups, sum of sizes, width], by the linears that were fused into it.

    ``names``: those linears; ``sizes``: how many of a group's blocks each owns. A rank's part holds whole groups, or
    (one group over all rows, ``width`` None) its share of each linear.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    width: int | None = None

    def rows(self, outputs: int) -> dict[str, int]:
        """Return how many of ``outputs`` rows each linear owns."""
        return {name: outputs * size // sum(self.sizes) for name, size in zip(self.names, self.sizes)}

    def add(self, fused: Tensor, changes: Mapping[str, Tensor], dim: int = -1) -> Tensor:
        """Return ``fused``, its rows along ``dim``, with ``changes`` added to the rows of the linears they name."""
        axis, each = dim % fused.dim(), sum(self.sizes)
        width = fused.shape[axis] // each if self.width is None else self.width
        held = fused.unflatten(axis, (-1, each, width)).split(self.sizes, axis + 1)
        changed = [
            part + changes[name].unflatten(axis, (-1, size, width)) if name in changes else part
            for name, size, part in zip(self.names, self.sizes, held)
        ]
        return torch.cat(changed, axis + 1).flatten(axis, axis + 2)
