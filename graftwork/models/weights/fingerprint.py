"""Fingerprint of a base: which weights these are, to the last bit, independent of files, shards and parallel sizes."""

import hashlib
import re
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from pydantic import BaseModel
from torch import Tensor

from graftwork.atomic import atomic_write_text, clear_leftovers
from graftwork.cache import cache_directory, file_stamp, locked
from graftwork.errors import CheckpointError
from graftwork.jsonfile import parse_json, validated
from graftwork.models.weights.files import TensorFiles
from graftwork.models.weights.hf import mapping_for, read_config, shape_from_hf
from graftwork.models.weights.load import open_checkpoint
from graftwork.models.weights.views import PartOfStack

WHOLE = "sha256:"
"""What every fingerprint starts with; those of version 0.1, which sampled each tensor, have no such beginning."""
SAMPLES, SAMPLE_BYTES = 16, 64
CHUNK = 4 * 2**20
THREADS = 4
SETTLED_NS = 20_000_000
"""Files this young may change once more within the same tick of the file system's clock: nothing is noted of them."""


def fingerprint(directory: str | Path, like: str | None = None) -> str:
    """Return the SHA-256 of the sorted (Hugging Face name, shape, dtype, bytes) of a checkpoint directory's tensors.

    The same weights in one file or many, experts stacked or not, give the same fingerprint. Cached under the user's
    cache as long as inode, size and change times of the files stay. ``like``: a fingerprint that this one will be
    compared with; for one of version 0.1 the result is of its kind. Raises CheckpointError for a directory that is no
    supported checkpoint.
    """
    mapping = mapping_for(shape_from_hf(read_config(directory)), tensor_parallel=1)
    with open_checkpoint(mapping, directory) as files:
        if like is not None and re.fullmatch("[0-9a-f]{64}", like):
            return _sampled(files)
        return _noted(files)


class Passing:
    """The fingerprint of a checkpoint whose tensors are yet to be written: each is told when it passes."""

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def note(self, name: str, tensor: Tensor, dtype: str) -> None:
        """Take a tensor by its Hugging Face name; ``dtype`` as safetensors names it."""
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        self._parts[name] = _described(name, list(tensor.shape), dtype) + hashlib.sha256(data).digest()

    @property
    def value(self) -> str:
        """What ``fingerprint`` returns of the files, if every tensor is in them as it was told."""
        return WHOLE + hashlib.sha256(b"".join(self._parts[name] for name in sorted(self._parts))).hexdigest()


def _noted(files: TensorFiles) -> str:
    """Return the fingerprint from the cache, else compute and note it; other ranks and processes wait for the first."""
    held = sorted(set(files.files.values()))
    stamp = file_stamp(*held)
    note = cache_directory() / "fingerprints" / stamp
    with locked(note):
        clear_leftovers(note.parent, note.name)
        known = note.read_text(errors="replace") if note.is_file() else ""
        if re.fullmatch(f"{WHOLE}[0-9a-f]{{64}}", known):
            return known
        began = time.time_ns()
        value = WHOLE + _digest(files)
        if file_stamp(*held) != stamp:
            raise CheckpointError(f"{str(files.directory)!r} changed while its weights were read; try again.")
        if max(file.stat().st_ctime_ns for file in held) + SETTLED_NS < began:
            atomic_write_text(note, value)
    return value


def _digest(files: TensorFiles) -> str:
    headers = {file: _Header(file) for file in set(files.files.values())}
    names = sorted(files.files)

    def one(name: str) -> bytes:
        return headers[files.files[name]].digest(entry(name))

    def entry(name: str) -> _Entry:
        return headers[files.files[name]].entry(files.stored_name(name), files.part(name))

    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as threads:  # hashing lets other threads run
        for name, found in zip(names, threads.map(one, names)):
            digest.update(_described(name, entry(name).shape, entry(name).dtype) + found)
    return digest.hexdigest()


def _described(name: str, shape: list[int], dtype: str) -> bytes:
    return f"{name}\0{shape}\0{dtype}\0".encode()


def _sampled(files: TensorFiles) -> str:
    """Return the fingerprint as version 0.1 took it: it sees a few bytes of each tensor."""
    headers = {file: _Header(file) for file in set(files.files.values())}
    digest = hashlib.sha256()
    for name in sorted(files.files):
        header = headers[files.files[name]]
        entry = header.entry(files.stored_name(name), files.part(name))
        digest.update(_described(name, entry.shape, entry.dtype))
        digest.update(header.sample(*entry.data_offsets))
    return digest.hexdigest()


class _Entry(BaseModel):
    """What a safetensors header says of one tensor; the offsets count from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Header:
    """Header of one safetensors file: where each tensor's bytes are."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            found = parse_json(handle.read(length), repr(str(file)), CheckpointError)
        assert isinstance(found, dict), "safetensors has read this header before"
        what = f"the header of {str(file)!r}"
        self.entries = {
            name: validated(entry, _Entry, what, CheckpointError)
            for name, entry in found.items()
            if name != "__metadata__"
        }
        self.start = 8 + length

    def entry(self, name: str, part: PartOfStack | None) -> _Entry:
        """Return what the header says of a tensor, or what follows of a part of it."""
        stored = self.entries[name]
        if part is None:
            return stored
        matrices, rows, columns = stored.shape
        begin, end = stored.data_offsets
        row = (end - begin) // (matrices * rows)
        place, height = begin + (part.index * rows + part.start) * row, part.stop - part.start
        return _Entry(dtype=stored.dtype, shape=[height, columns], data_offsets=(place, place + height * row))

    def digest(self, entry: _Entry) -> bytes:
        """Return the SHA-256 of a tensor's bytes."""
        digest = hashlib.sha256()
        with open(self.file, "rb") as handle:
            for part in self._parts(handle, *entry.data_offsets):
                digest.update(part)
        return digest.digest()

    def sample(self, begin: int, end: int) -> bytes:
        """Return SAMPLES pieces of SAMPLE_BYTES, evenly spread from the tensor's first byte to its last."""
        last = max(begin, end - SAMPLE_BYTES)
        places = sorted({begin + (last - begin) * i // (SAMPLES - 1) for i in range(SAMPLES)})
        with open(self.file, "rb") as handle:
            return b"".join(self._piece(handle, place, min(SAMPLE_BYTES, end - place)) for place in places)

    def _parts(self, handle: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
        for place in range(begin, end, CHUNK):
            yield self._piece(handle, place, min(CHUNK, end - place))

    def _piece(self, handle: BinaryIO, place: int, wanted: int) -> bytes:
        handle.seek(self.start + place)
        data = handle.read(wanted)
        if len(data) != wanted:
            raise CheckpointError(f"{str(self.file)!r} is shorter than its header says.")
        return data
