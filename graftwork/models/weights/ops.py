"""Reshape operations between one megatron-core tensor and the Hugging Face tensors it is made of.

Each operation reads one rank's part from lazy sources (touching nothing else) and writes the full core tensor back
as Hugging Face tensors, bit by bit the inverse. They compose: GPT-2's ``c_attn`` is Transposed(Fused(QKV)).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graftwork.models.weights.views import RowsView, Source, TransposedView
from graftwork.parallel.sharding import Sharding

Shapes = list[tuple[int, ...]]


class Op(Protocol):
    """One core tensor <-> its Hugging Face tensors."""

    @property
    def sharding(self) -> Sharding:
        """How the core tensor is cut over tensor-parallel ranks."""
        ...

    @property
    def shapes(self) -> Shapes:
        """Shape of each Hugging Face tensor, in the rule's order."""
        ...

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        """Return the part of the core tensor that ``rank`` of ``size`` holds."""
        ...

    def write(self, full: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors of the full core tensor."""
        ...


@dataclass(frozen=True)
class Copy:
    """The same tensor under two names, cut as ``sharding`` says (vocabulary padding included)."""

    sharding: Sharding

    @property
    def shapes(self) -> Shapes:
        return [self.sharding.shape]

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        return self.sharding.read(sources[0], rank, size)

    def write(self, full: Tensor) -> list[Tensor]:
        return [full]


@dataclass(frozen=True)
class Gated:
    """[gate; up] stacked in one fc1, each rank holding [gate_i; up_i]; ``rows`` of each half, ``tail`` () or (h,)."""

    rows: int
    tail: tuple[int, ...]

    @property
    def sharding(self) -> Sharding:
        return Sharding((2 * self.rows, *self.tail), dim=0, blocks=2)

    @property
    def shapes(self) -> Shapes:
        return [(self.rows, *self.tail)] * 2

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        half = Sharding((self.rows, *self.tail), dim=0)
        return torch.cat([half.read(source, rank, size) for source in sources])

    def write(self, full: Tensor) -> list[Tensor]:
        return list(full.chunk(2))


@dataclass(frozen=True)
class QKV:
    """q, k, v interleaved by query group: rows viewed as [groups, heads/groups + 2, channels]."""

    heads: int
    groups: int
    channels: int
    tail: tuple[int, ...]

    @property
    def sharding(self) -> Sharding:
        return Sharding((sum(rows for rows, *_ in self.shapes), *self.tail), dim=0)

    @property
    def shapes(self) -> Shapes:
        return [(n * self.channels, *self.tail) for n in (self.heads, self.groups, self.groups)]

    @property
    def split(self) -> list[int]:
        """Heads of q, k and v in one group."""
        return [self.heads // self.groups, 1, 1]

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        parts = [
            Sharding(shape, dim=0).read(source, rank, size).view(self.groups // size, heads, self.channels, *self.tail)
            for source, shape, heads in zip(sources, self.shapes, self.split)
        ]
        return torch.cat(parts, dim=1).flatten(0, 2)

    def write(self, full: Tensor) -> list[Tensor]:
        # The last dimension may differ from ``tail``: adapters pass [rows, rank] through the same layout.
        grouped = full.view(self.groups, sum(self.split), self.channels, *full.shape[1:])
        return [part.flatten(0, 2) for part in grouped.split(self.split, dim=1)]


@dataclass(frozen=True)
class Fused:
    """The Hugging Face side holds the inner operation's tensors stacked in one."""

    inner: Op

    @property
    def sharding(self) -> Sharding:
        return self.inner.sharding

    @property
    def shapes(self) -> Shapes:
        rows = sum(shape[0] for shape in self.inner.shapes)
        return [(rows, *self.inner.shapes[0][1:])]

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        views, start = [], 0
        for shape in self.inner.shapes:
            views.append(RowsView(sources[0], start, start + shape[0]))
            start += shape[0]
        return self.inner.read(views, rank, size)

    def write(self, full: Tensor) -> list[Tensor]:
        return [torch.cat(self.inner.write(full))]


@dataclass(frozen=True)
class Transposed:
    """The Hugging Face side stores [in, out] (GPT-2's Conv1D)."""

    inner: Op

    @property
    def sharding(self) -> Sharding:
        return self.inner.sharding

    @property
    def shapes(self) -> Shapes:
        return [tuple(reversed(shape)) for shape in self.inner.shapes]

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        return self.inner.read([TransposedView(source) for source in sources], rank, size)

    def write(self, full: Tensor) -> list[Tensor]:
        return [tensor.T for tensor in self.inner.write(full)]
