"""Files of ``torch.save``, read as the plain data and tensors they hold: nothing they ask for runs."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from graftwork.errors import GraftworkError, quoted
from graftwork.jsonfile import MAX_DEPTH, deeper, read_bytes

MAX_BYTES = 2**28
"""Largest such file that is read: what is large in a training state are its tensors, which lie elsewhere."""

DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What torch raises for a damaged file."""


def read_torch(path: Path, error: type[GraftworkError]) -> object:
    """Return what ``torch.save`` wrote, read once; raises ``error`` in one sentence for anything but plain data.

    torch's own choice of a reader is not relied upon: an environment variable changes it to one that runs code.
    """
    data = read_bytes(path, error, MAX_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as entries:
            # torch writes them as they are; compressed ones may grow a thousandfold.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.infolist()):
                raise error(f"{quoted(path.name)} is compressed, which no file of torch is")
        found: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except DAMAGED as problem:
        if isinstance(problem, GraftworkError):
            raise
        first = str(problem).strip().partition("\n")[0]
        raise error(
            f"{quoted(path.name)} is damaged ({type(problem).__name__}: {quoted(first, bare=True)})"
        ) from problem
    if deeper(found):
        raise error(f"{quoted(path.name)} is nested deeper than {MAX_DEPTH} levels")
    return found
