"""A file whose bytes are those that were verified, and the safetensors tensors in it, read by slices.

Between the check of a checksum and the reading of a slice somebody may replace the file or write into it. So it is
opened once, digested block by block, and no block is handed out that is not what was digested.
"""

import hashlib
import math
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, RootModel
from torch import Tensor

from graftwork.errors import ArtifactError, quoted
from graftwork.jsonfile import MAX_BYTES, parse_json, validated

BLOCK = 1 << 20
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Number formats whose values fp32 holds exactly, as safetensors names them."""
_LENGTH = 8  # bytes of the header's length

Natural = Annotated[int, Field(ge=0)]


class VerifiedFile:
    """A regular file, opened once: every byte that ``read`` returns is covered by ``digest``.

    Raises ArtifactError for what is no regular file, OSError for what cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = _opened(path)
        self._blocks: list[bytes] = []
        self._last = (-1, b"")
        self.size, self.digest = 0, hashlib.sha256()
        with ExitStack() as failed:
            failed.callback(self.close)
            self._digest_all()
            failed.pop_all()

    def read(self, start: int, stop: int) -> bytearray:
        """Return the bytes from ``start`` to ``stop``; raises ArtifactError when they are not what was digested."""
        found = bytearray()
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            first = number * BLOCK
            found += self._block(number)[max(0, start - first) : stop - first]
        if len(found) != max(0, stop - start):
            raise ArtifactError(f"{quoted(self.path)} ends before its tensors do; it is truncated.")
        return found

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    def _digest_all(self) -> None:
        while block := self._handle.read(BLOCK):
            self.digest.update(block)
            self._blocks.append(hashlib.sha256(block).digest())
            self.size += len(block)

    def _block(self, number: int) -> bytes:
        if self._last[0] != number:
            self._handle.seek(number * BLOCK)
            block = self._handle.read(BLOCK)
            wanted = self._blocks[number] if number < len(self._blocks) else None
            if hashlib.sha256(block).digest() != wanted:
                raise ArtifactError(f"{quoted(self.path)} was changed while it was read; load the adapter again.")
            self._last = (number, block)
        return self._last[1]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a verified safetensors file, read by slices, as fp32: only what the slice's rows touch."""

    file: VerifiedFile
    shape: tuple[int, ...]
    start: int
    dtype: torch.dtype = torch.float32

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return list(self.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """Return a part of the tensor: a slice of the first dimension, or one of every dimension."""
        rows, rest = (index[0], index[1:]) if isinstance(index, tuple) else (index, ())
        kept = range(self.shape[0])[rows] if self.shape else range(1)
        width = self.dtype.itemsize * math.prod(self.shape[1:])
        data = self.file.read(self.start + kept.start * width, self.start + kept.stop * width)
        shape = (len(kept), *self.shape[1:]) if self.shape else ()
        held = torch.frombuffer(data, dtype=self.dtype).reshape(shape) if data else torch.empty(shape)
        tensor = held.float()
        return tensor[(slice(None), *rest)] if rest else tensor


class _Header(BaseModel):
    """What a safetensors header says of one tensor."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Annotated[str, Field(max_length=20)]
    shape: Annotated[list[Natural], Field(max_length=8)]
    data_offsets: Annotated[list[Natural], Field(min_length=2, max_length=2)]


class _Metadata(RootModel[dict[str, str]]):
    """What a safetensors header says of the whole file."""


class _Headers(RootModel[dict[str, _Header]]):
    """A safetensors header without its metadata."""


def stored_tensors(file: VerifiedFile, formats: Sequence[str] = ("F32",)) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, no value read yet.

    Raises ArtifactError when the header is damaged, holds another of the ``DTYPES`` than ``formats``, or its tensors do
    not fill the file.
    """
    what = f"{quoted(file.path)} cannot be read: its header"
    length = int.from_bytes(file.read(0, _LENGTH), "little") if file.size >= _LENGTH else 0
    data = _LENGTH + length
    if not length or data > file.size or length > MAX_BYTES:
        raise ArtifactError(f"{what} is not whole; it is truncated or damaged.")
    raw = parse_json(bytes(file.read(_LENGTH, data)), what, ArtifactError)
    if isinstance(raw, dict) and (metadata := raw.pop("__metadata__", None)) is not None:
        validated(metadata, _Metadata, what, ArtifactError)  # tells nothing that is read
    headers = validated(raw, _Headers, what, ArtifactError).root
    _check_offsets(headers, file, file.size - data, formats)
    return {
        key: StoredTensor(file, tuple(h.shape), data + h.data_offsets[0], DTYPES[h.dtype]) for key, h in headers.items()
    }


def _check_offsets(headers: Mapping[str, _Header], file: VerifiedFile, size: int, formats: Sequence[str]) -> None:
    """Raise unless the tensors lie one after the other, each as long as its shape says, to the end of the file."""
    end = 0
    for key, header in sorted(headers.items(), key=lambda item: item[1].data_offsets):
        if header.dtype not in formats:
            raise ArtifactError(
                f"Tensor {quoted(key)} in {quoted(file.path)} is stored as {header.dtype!r}; an adapter's are "
                f"{', '.join(formats)}."
            )
        start, stop = header.data_offsets
        if start != end or stop - start != DTYPES[header.dtype].itemsize * math.prod(header.shape):
            raise ArtifactError(
                f"Tensor {quoted(key)} in {quoted(file.path)} does not lie where its shape says; the file is damaged."
            )
        end = stop
    if end != size:
        raise ArtifactError(
            f"{quoted(file.path)} cannot be read (its tensors have {end:,} bytes, the file has {size:,} for them); "
            "it is truncated or damaged."
        )


def _opened(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would block until somebody writes to it
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ArtifactError(f"{quoted(path)} is not a regular file.")
    return open(descriptor, "rb")
