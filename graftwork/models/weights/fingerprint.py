"""Fingerprint of a base: which weights these are, independent of files, shards and parallel sizes."""

import hashlib
import json
import struct
from pathlib import Path
from typing import BinaryIO, TypedDict

from graftwork.atomic import atomic_write_text
from graftwork.cache import cache_directory, file_stamp
from graftwork.errors import CheckpointError
from graftwork.models.weights.files import TensorFiles
from graftwork.models.weights.hf import mapping_for, read_config, shape_from_hf

SAMPLES, SAMPLE_BYTES = 16, 64


def fingerprint(directory: str | Path) -> str:
    """Return the SHA-256 of the sorted (Hugging Face name, shape, dtype, sampled bytes) of a checkpoint directory.

    The same weights in one file or many give the same fingerprint. Cached under the user's cache as long as the
    files do not change. Raises CheckpointError for a directory that is no supported checkpoint.
    """
    mapping = mapping_for(shape_from_hf(read_config(directory)), tensor_parallel=1)
    with TensorFiles(directory, mapping.canonical) as files:
        cached = cache_directory() / "fingerprints" / file_stamp(*set(files.files.values()))
        if cached.is_file():
            return cached.read_text()
        value = _compute(files)
    atomic_write_text(cached, value)
    return value


def _compute(files: TensorFiles) -> str:
    headers = {file: _Header(file) for file in set(files.files.values())}
    digest = hashlib.sha256()
    for name in sorted(files.files):
        header = headers[files.files[name]]
        entry = header.entries[files.stored_name(name)]
        digest.update(f"{name}\0{entry['shape']}\0{entry['dtype']}\0".encode())
        digest.update(header.sample(*entry["data_offsets"]))
    return digest.hexdigest()


class _Entry(TypedDict):
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
            self.entries: dict[str, _Entry] = json.loads(handle.read(length))
        self.start = 8 + length

    def sample(self, begin: int, end: int) -> bytes:
        """Return SAMPLES pieces of SAMPLE_BYTES, evenly spread from the tensor's first byte to its last."""
        last = max(begin, end - SAMPLE_BYTES)
        places = sorted({begin + (last - begin) * i // (SAMPLES - 1) for i in range(SAMPLES)})
        with open(self.file, "rb") as handle:
            return b"".join(self._piece(handle, place, end) for place in places)

    def _piece(self, handle: BinaryIO, place: int, end: int) -> bytes:
        handle.seek(self.start + place)
        wanted = min(SAMPLE_BYTES, end - place)
        data = handle.read(wanted)
        if len(data) != wanted:
            raise CheckpointError(f"{str(self.file)!r} is shorter than its header says.")
        return data
