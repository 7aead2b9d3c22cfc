"""How one full tensor is cut over the tensor-parallel ranks: shapes, slices, and the way back."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graftwork.errors import ParallelismError


class Source(Protocol):
    """A tensor that is read by slices, such as safetensors' ``get_slice`` returns: only the indexed part is touched."""

    def get_shape(self) -> list[int]:
        """Shape of the whole tensor."""
        ...

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Sharding:
    """How one full tensor is cut over the tensor-parallel ranks.

    shape: the full, un-padded shape; dim: the cut dimension, None = replicated; blocks: parts of ``dim`` that are cut
    each on its own (2 for a gated fc1: rank i holds [gate_i; up_i]); padded: length of ``dim`` with padding at its
    end (vocabulary), None = no padding.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    blocks: int = 1
    padded: int | None = None

    def __post_init__(self) -> None:
        if self.padded is not None and (self.blocks != 1 or self.padded < self.length):
            raise ParallelismError(f"padding {self.padded} does not fit a dimension of {self.length} in one block.")

    @property
    def length(self) -> int:
        """Full, un-padded length of the cut dimension (1 when replicated)."""
        return 1 if self.dim is None else self.shape[self.dim]

    def local_length(self, size: int) -> int:
        """Length of the cut dimension on each of ``size`` ranks, padding included."""
        total = self.length if self.padded is None else self.padded
        if total % (self.blocks * size):
            raise ParallelismError(
                f"a dimension of {total} in {self.blocks} block(s) cannot be cut over {size} tensor-parallel ranks: "
                f"it must be a multiple of {self.blocks * size}."
            )
        return total // size

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape that each of ``size`` ranks holds, padding included."""
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.dim] = self.local_length(size)
        return tuple(shape)

    def slices(self, rank: int, size: int) -> list[slice]:
        """Slices of the full tensor along ``dim`` that ``rank`` holds, in local order, clipped to the full shape."""
        if self.dim is None:
            return []
        step = self.local_length(size) // self.blocks
        starts = [block * (self.length // self.blocks) + rank * step for block in range(self.blocks)]
        return [slice(min(s, self.length), min(s + step, self.length)) for s in starts]

    def take(self, full: Tensor, rank: int, size: int) -> Tensor:
        """Return the local part of ``full``, zero-padded; a copy, so that ``full`` can be freed."""
        self._check(tuple(full.shape))
        if self.dim is None:
            return full.clone()
        return self._pad(torch.cat([full[self._index(s)] for s in self.slices(rank, size)], self.dim), size)

    def read(self, source: Source, rank: int, size: int) -> Tensor:
        """Return the local part from a safetensors slice (``file.get_slice(name)``), reading nothing else."""
        self._check(tuple(source.get_shape()))
        if self.dim is None:
            return source[:]
        return self._pad(torch.cat([source[self._index(s)] for s in self.slices(rank, size)], self.dim), size)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Return the full tensor from every rank's part, padding dropped: the inverse of ``take``."""
        if self.dim is None:
            return parts[0]
        blocks = [part.chunk(self.blocks, self.dim) for part in parts]
        joined = torch.cat(
            [blocks[rank][block] for block in range(self.blocks) for rank in range(len(parts))], self.dim
        )
        return joined.narrow(self.dim, 0, self.length)

    def _index(self, along: slice) -> tuple[slice, ...]:
        return tuple(along if axis == self.dim else slice(None) for axis in range(len(self.shape)))

    def _pad(self, local: Tensor, size: int) -> Tensor:
        shape = self.local_shape(size)
        if tuple(local.shape) == shape:
            return local
        padded = local.new_zeros(shape)
        padded[tuple(slice(0, n) for n in local.shape)] = local
        return padded

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape != self.shape:
            raise ParallelismError(f"the tensor has shape {shape}, but {self.shape} is expected.")
