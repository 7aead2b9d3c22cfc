"""Reshape operations between one megatron-core tensor and the Hugging Face tensors it is made of.

Each operation reads one rank's part from lazy sources (touching nothing else) and writes the full core tensor back
as Hugging Face tensors, bit by bit the inverse. They compose: GPT-2's ``c_attn`` is Transposed(Fused(QKV)).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graftwork.models.weights.views import RowsView, TransposedView
from graftwork.parallel.fused import GatedRows, KVRows, QKVRows
from graftwork.parallel.sharding import Sharding, Source

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
        """Return the Hugging Face tensors of the full core tensor; other widths than ``shapes`` say pass as well."""
        ...

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the full core tensor of Hugging Face tensors: the inverse of ``write``."""
        ...


@dataclass(frozen=True)
class Copy:
    """The same tensor under two names, cut as ``sharding`` says (vocabulary padding included)."""

    sharding: Sharding

    @property
    def shapes(self) -> Shapes:
        """Shape of each Hugging Face tensor."""
        return [self.sharding.shape]

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        """Return the rank's part of the core tensor."""
        return self.sharding.read(sources[0], rank, size)

    def write(self, full: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors."""
        return [full]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the full core tensor of Hugging Face tensors: the inverse of ``write``."""
        return tensors[0]


@dataclass(frozen=True)
class Gated:
    """Gate and up projection in one fc1; ``rows`` of each half, ``tail`` () or (h,)."""

    rows: int
    tail: tuple[int, ...]

    @property
    def sharding(self) -> Sharding:
        """How the core tensor is cut."""
        return Sharding((2 * self.rows, *self.tail), dim=0, blocks=2)

    @property
    def shapes(self) -> Shapes:
        """Shape of each Hugging Face tensor."""
        return [(self.rows, *self.tail)] * 2

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        """Return the rank's part of the core tensor."""
        half = Sharding((self.rows, *self.tail), dim=0)
        gate, up = (half.read(source, rank, size) for source in sources)
        return GatedRows.join(gate, up)

    def write(self, full: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors."""
        return list(GatedRows.split(full))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the full core tensor of Hugging Face tensors: the inverse of ``write``."""
        gate, up = tensors
        return GatedRows.join(gate, up)


@dataclass(frozen=True)
class QKV:
    """Queries, keys and values in one linear, interleaved by query group; ``tail`` () or (h,)."""

    heads: int
    groups: int
    channels: int
    tail: tuple[int, ...]

    @property
    def rows(self) -> QKVRows:
        """Which rows of the fused linear are whose."""
        return QKVRows(self.heads, self.groups, self.channels)

    @property
    def sharding(self) -> Sharding:
        """How the core tensor is cut."""
        return Sharding((sum(self.rows.counts), *self.tail), dim=0)

    @property
    def shapes(self) -> Shapes:
        """Shape of each Hugging Face tensor."""
        return [(count, *self.tail) for count in self.rows.counts]

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        """Return the rank's part of the core tensor."""
        query, key, value = (
            Sharding(shape, dim=0).read(source, rank, size) for source, shape in zip(sources, self.shapes)
        )
        return self.rows.join(query, key, value)

    def write(self, full: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors."""
        return list(self.rows.split(full))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the full core tensor of Hugging Face tensors: the inverse of ``write``."""
        query, key, value = tensors
        return self.rows.join(query, key, value)


@dataclass(frozen=True)
class KV:
    """Keys and values in one linear, interleaved by head; ``tail`` () or (h,)."""

    heads: int
    channels: int
    tail: tuple[int, ...]

    @property
    def rows(self) -> KVRows:
        """Which rows of the fused linear are whose."""
        return KVRows(self.heads, self.channels)

    @property
    def sharding(self) -> Sharding:
        """How the core tensor is cut."""
        return Sharding((sum(self.rows.counts), *self.tail), dim=0)

    @property
    def shapes(self) -> Shapes:
        """Shape of each Hugging Face tensor."""
        return [(count, *self.tail) for count in self.rows.counts]

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        """Return the rank's part of the core tensor."""
        key, value = (Sharding(shape, dim=0).read(source, rank, size) for source, shape in zip(sources, self.shapes))
        return self.rows.join(key, value)

    def write(self, full: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors."""
        return list(self.rows.split(full))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the full core tensor of Hugging Face tensors: the inverse of ``write``."""
        key, value = tensors
        return self.rows.join(key, value)


@dataclass(frozen=True)
class Fused:
    """The Hugging Face side holds the inner operation's tensors stacked in one."""

    inner: Op

    @property
    def sharding(self) -> Sharding:
        """How the core tensor is cut."""
        return self.inner.sharding

    @property
    def shapes(self) -> Shapes:
        """Shape of each Hugging Face tensor."""
        rows = sum(shape[0] for shape in self.inner.shapes)
        return [(rows, *self.inner.shapes[0][1:])]

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        """Return the rank's part of the core tensor."""
        views, start = [], 0
        for shape in self.inner.shapes:
            views.append(RowsView(sources[0], start, start + shape[0]))
            start += shape[0]
        return self.inner.read(views, rank, size)

    def write(self, full: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors."""
        return [torch.cat(self.inner.write(full))]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the full core tensor of Hugging Face tensors: the inverse of ``write``."""
        return self.inner.join(tensors[0].split([shape[0] for shape in self.inner.shapes]))


@dataclass(frozen=True)
class Whole:
    """The inner operation for a tensor that every tensor-parallel rank holds whole, as experts are."""

    inner: Op

    @property
    def sharding(self) -> Sharding:
        """How the core tensor is cut: it is not."""
        return Sharding(self.inner.sharding.shape)

    @property
    def shapes(self) -> Shapes:
        """Shape of each Hugging Face tensor."""
        return self.inner.shapes

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        """Return the core tensor."""
        return self.inner.read(sources, 0, 1)

    def write(self, full: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors."""
        return self.inner.write(full)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the full core tensor of Hugging Face tensors: the inverse of ``write``."""
        return self.inner.join(tensors)


@dataclass(frozen=True)
class Transposed:
    """The Hugging Face side stores [in, out] (GPT-2's Conv1D)."""

    inner: Op

    @property
    def sharding(self) -> Sharding:
        """How the core tensor is cut."""
        return self.inner.sharding

    @property
    def shapes(self) -> Shapes:
        """Shape of each Hugging Face tensor."""
        return [tuple(reversed(shape)) for shape in self.inner.shapes]

    def read(self, sources: Sequence[Source], rank: int, size: int) -> Tensor:
        """Return the rank's part of the core tensor."""
        return self.inner.read([TransposedView(source) for source in sources], rank, size)

    def write(self, full: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors."""
        return [tensor.T for tensor in self.inner.write(full)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the full core tensor of Hugging Face tensors: the inverse of ``write``."""
        return self.inner.join([tensor.T for tensor in tensors])
