"""Files as bytes, decompressed where their name says that they are compressed."""

import gzip
import io
from pathlib import Path
from typing import IO

import pyarrow

from graftwork.errors import DataError, quoted

COMPRESSED = (".gz", ".zst")
"""What a compressed file's name ends in, behind the ending of its kind."""


def ending(path: str) -> str:
    """Return what tells the kind of a file, without the ending of a compressed one: ``.jsonl`` of ``a.jsonl.gz``."""
    name = Path(path)
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def open_bytes(path: str) -> IO[bytes]:
    """Open a file to read its bytes, decompressed; reading a damaged one raises OSError, EOFError or zlib.error."""
    suffix = Path(path).suffix
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if suffix == ".zst":
        if not pyarrow.Codec.is_available("zstd"):
            raise DataError(f"data file {quoted(path)} is compressed by zstd, which this pyarrow was built without.")
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")
