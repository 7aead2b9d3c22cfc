"""What a GGUF file claims of itself, compared with its size before the library reads it.

The library takes counts and lengths as they come: one wrong byte is a list of 2**60 entries that it builds until the
memory is full. Here every count has a limit, and everything that is named lies inside of the file.
"""

import mmap
import os
import stat
import struct
from pathlib import Path
from typing import NoReturn

from graftwork.errors import CheckpointError, quoted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_NAME = 2**16 - 1
MAX_ENTRIES = 2**16
"""Most metadata entries and most tensors; a model of 126 layers has 1,138."""
MAX_ITEMS = 2**22
"""Most items of all lists together; a vocabulary of 262,144 tokens and its merges have 1.3 million."""
MAX_DIMENSIONS = 4
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each type of one value."""
_STRING, _LIST = 8, 9


def check_header(path: Path) -> None:
    """Raise CheckpointError unless ``path`` is a regular file whose metadata and tensors lie inside of it."""
    try:
        # A pipe would block until somebody writes to it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{quoted(path)} is not a regular file.")
            if os.fstat(file.fileno()).st_size < len(MAGIC):
                raise CheckpointError(f"{quoted(path)} is no readable GGUF file: it ends within its header.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Header(path, data).check()
    except OSError as problem:
        raise CheckpointError(f"{quoted(path)} cannot be read: {problem.strerror}.") from problem


class _Header:
    """Walks over a header once."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.at = 0
        self.items = 0
        self.order = "<"

    def check(self) -> None:
        """Go over metadata and tensors."""
        if self._take(len(MAGIC)) != MAGIC:
            self._refuse("it does not begin with 'GGUF'")
        if struct.unpack_from("<I", self.data[4:8].ljust(4, b"\0"))[0] & 0xFFFF == 0:
            self.order = ">"  # written for the other kind of processor
        version = self._number("I")
        if version not in VERSIONS:
            self._refuse(f"it has version {version}, 2 and 3 are read")
        tensors, entries = self._number("Q"), self._number("Q")
        if max(tensors, entries) > MAX_ENTRIES:
            self._refuse(f"it claims {entries:,} settings and {tensors:,} tensors")
        for _ in range(entries):
            self._text(MAX_NAME)
            self._value(self._number("I"))
        ends = [self._tensor() for _ in range(tensors)]
        if ends and max(ends) > len(self.data) - self.at:
            self._refuse("it ends before its tensors do")

    def _value(self, kind: int) -> None:
        if kind != _LIST:
            self._plain(kind, 1)
            return
        inner, count = self._number("I"), self._number("Q")
        self.items += count
        if self.items > MAX_ITEMS:
            self._refuse(f"it claims lists of {self.items:,} items")
        self._plain(inner, count)

    def _plain(self, kind: int, count: int) -> None:
        if kind == _STRING:
            for _ in range(count):
                self._text(len(self.data))
        elif kind in _SCALARS:
            self._skip(_SCALARS[kind] * count)
        else:
            self._refuse(f"it holds a value of the unknown type {kind}")

    def _tensor(self) -> int:
        """Go over one tensor's entry; return where it ends behind the header, counted from the first tensor."""
        from gguf.constants import GGML_QUANT_SIZES

        name = self._text(MAX_NAME)
        dimensions = self._number("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            self._refuse(f"the tensor {quoted(name)} has {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= self._number("Q")
        kind, start = self._number("I"), self._number("Q")
        sizes = {int(known): size for known, size in GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            self._refuse(f"the tensor {quoted(name)} has the unknown type {kind}")
        block, size = sizes[kind]
        if elements % block:
            self._refuse(f"the tensor {quoted(name)} has {elements:,} numbers, which are no whole blocks of {block}")
        return int(start + elements // block * size)

    def _text(self, limit: int) -> str:
        length = self._number("Q")
        if length > limit:
            self._refuse(f"it claims a text of {length:,} bytes")
        data = self._take(length)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._refuse(f"{quoted(data[:40])} is not UTF-8 text")

    def _number(self, kind: str) -> int:
        return int(struct.unpack(self.order + kind, self._take(struct.calcsize(self.order + kind)))[0])

    def _take(self, size: int) -> bytes:
        start = self.at
        self._skip(size)
        return self.data[start : self.at]

    def _skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            self._refuse("it ends within its header")
        self.at += size

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{quoted(self.path)} is no readable GGUF file: {reason}.")
