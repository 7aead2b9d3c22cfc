"""Safetensors written one tensor at a time: the header is known beforehand, so nothing has to be kept."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from graftwork.models.weights.files import INDEX, SINGLE

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Entry:
    """One tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_sharded(directory: Path, entries: list[Entry], tensors: Iterator[Tensor], shard_bytes: int) -> None:
    """Write ``tensors``, in the order of ``entries``, to safetensors files of at most ``shard_bytes`` with an index.

    ``entries`` must go from wide to narrow dtypes: readers need each tensor to start at a multiple of its item size.
    """
    shards = _shards(entries, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards):
        write_file(directory / name, shard, tensors)
    if len(shards) > 1:
        places = {entry.name: name for name, shard in zip(names, shards) for entry in shard}
        index = {"metadata": {"total_size": sum(e.size for e in entries)}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, entries: list[Entry], tensors: Iterator[Tensor]) -> None:
    """Write ``tensors``, in the order of ``entries``, to one safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        place = [offset, offset + entry.size]
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": place}
        offset += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = next(tensors)
            if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
                raise RuntimeError(f"{entry.name}: {tensor.shape} {tensor.dtype} does not match {entry}")
            handle.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
