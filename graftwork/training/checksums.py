"""Cheap checksums of parameters, taken where they lie: did a weight move, do replicas agree?"""

from collections.abc import Iterable

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> tuple[int, int]:
    """Return two sums over the tensor's bits: of all elements and of every second one (so that a swap shows)."""
    if not tensor.numel():
        return 0, 0
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten()
    return int(bits.sum(dtype=torch.int64)), int(bits[::2].sum(dtype=torch.int64))


def checksums(named: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, int]]:
    """Return the checksum of every named tensor."""
    return {name: checksum(tensor) for name, tensor in named}


def changed(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """Return the names whose checksum differs, or that only one side has."""
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
