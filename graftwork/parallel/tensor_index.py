"""The index of a torch distributed checkpoint (``.metadata``), read as the plain data it is.

torch writes it with pickle and reads it with ``pickle.load``, which runs whatever a foreign file asks for. Here only
the classes of such an index are made, and what they say is checked before anybody trusts it.
"""

import io
import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from graftwork.errors import CheckpointError, quoted
from graftwork.jsonfile import named_inside, read_bytes

MAX_BYTES = 2**30
"""Largest index that is read; one of a hundred thousand tensors has a tenth of it."""

_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    _CHECKPOINT + "metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    _CHECKPOINT + "planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    _CHECKPOINT + "filesystem": {"_StorageInfo"},
}  # fmt: skip
"""What an index consists of beside torch's dtypes."""
_COMMON = "common_state/"
"""What newer versions of megatron-core put there of all that is no tensor: nothing here, so it is left out."""


class DamagedError(CheckpointError):
    """Files that cannot be written or read; the message is the cause alone."""


class _Unpickler(pickle.Unpickler):
    """Makes the classes of an index and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        """Return a class of the list; DamagedError for any other."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if name not in _ALLOWED.get(module, ()):
            wanted = quoted(f"{module}.{name}")
            raise DamagedError(f"its index asks for {wanted}, which no index of tensors needs")
        return super().find_class(module, name)


def read_index(directory: Path) -> Metadata:
    """Return the index of the distributed checkpoint in ``directory``; raises DamagedError.

    Nothing of a foreign file runs: no class beside those of an index is made, files it names lie in ``directory``, and
    no objects stored as bytes are passed on, which torch would unpickle in turn.
    """
    found = _Unpickler(io.BytesIO(read_bytes(directory / ".metadata", DamagedError, MAX_BYTES))).load()
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise DamagedError("its index is none")
    if not isinstance(found.storage_data, dict):
        raise DamagedError("its index names no files")
    tensors = {key: entry for key, entry in found.state_dict_metadata.items() if not _is_common(key, entry)}
    found.state_dict_metadata = tensors
    for key, tensor in tensors.items():
        _check_tensor(key, tensor, found.storage_data)
    for name in {place.relative_path for place in found.storage_data.values()}:
        named_inside(directory, name, "its index", DamagedError)
    return found


@contextmanager
def indices_as_data() -> Iterator[None]:
    """Make every reader of distributed checkpoints read indices with ``read_index`` inside the block."""
    own = FileSystemReader.read_metadata

    def read(self: FileSystemReader, *args: object, **kwargs: object) -> Metadata:
        metadata = read_index(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    setattr(FileSystemReader, "read_metadata", read)  # noqa: B010  (megatron-core makes its readers itself)
    try:
        yield
    finally:
        setattr(FileSystemReader, "read_metadata", own)  # noqa: B010


def _is_common(key: object, entry: object) -> bool:
    return isinstance(key, str) and key.startswith(_COMMON) and isinstance(entry, BytesStorageMetadata)


def _check_tensor(key: object, tensor: object, places: dict[object, object]) -> None:
    """Raise unless the parts of one tensor make it up exactly: a gap would keep what the memory held before."""
    if not isinstance(key, str) or not isinstance(tensor, TensorStorageMetadata):
        raise DamagedError(f"its index holds {quoted(key)}, which is no tensor")
    parts = tensor.chunks
    if not all(isinstance(p, ChunkStorageMetadata) and _inside(p, tensor.size) for p in parts):
        raise DamagedError(f"parts of {quoted(key)} lie outside of it")
    whole = sum(math.prod(p.sizes) for p in parts) == math.prod(tensor.size)
    if not whole or any(_overlap(a, b) for a, b in combinations(parts, 2)):
        raise DamagedError(f"the parts of {quoted(key)} do not make it up")
    known = [MetadataIndex(key, p.offsets) in places for p in parts]
    if not all(known):
        raise DamagedError(f"no file is named for a part of {quoted(key)}")


def _inside(part: ChunkStorageMetadata, size: Sequence[int]) -> bool:
    same = len(part.offsets) == len(part.sizes) == len(size)
    return same and all(o >= 0 and n >= 0 and o + n <= s for o, n, s in zip(part.offsets, part.sizes, size))


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    sides = zip(a.offsets, a.sizes, b.offsets, b.sizes)
    return all(p < q + m and q < p + n for p, n, q, m in sides)
