"""A JSON array of rows, read one row at a time: the file may be larger than the memory."""

import codecs
import itertools
import json
from collections.abc import Iterator
from typing import IO

from graftwork.data.place import Place
from graftwork.errors import DataError
from graftwork.jsonfile import MAX_BYTES, MAX_DEPTH

BLOCK = 2**20
"""Bytes that are read at once, at least."""

_SPACE = " \t\n\r"
_CLOSE = 16
"""An error this near to the end of what was read may be that of a number, word or escape that is cut there."""


def begins_array(file: IO[bytes]) -> bool:
    """Whether a file's first character is that of an array."""
    return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def array_rows(file: IO[bytes], path: str) -> Iterator[tuple[Place, bytes]]:
    """Yield each object of the array as JSON text, with its place; raises DataError where there is no such array."""
    window = _Window(file, path)
    window.take()
    if window.peek() == "]":
        window.take()
    else:
        for number in itertools.count(1):
            place = Place(path, "row", number)
            yield place, window.row(place)
            if (mark := window.take()) == "]":
                break
            if mark != ",":
                raise DataError(f"{place}: not valid JSON (a comma or the array's end must follow the row).")
    if window.peek():
        raise DataError(f"{path}: not valid JSON (something follows the array's end).")


class _Window:
    """The part of a file's text that is looked at."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self.file = file
        self.path = path
        self.text = ""
        self.at = 0
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.scan = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is no white space, '' at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """Return that character and go on behind it."""
        found = self.peek()
        self.at += len(found)
        return found

    def row(self, place: Place) -> bytes:
        """Return the object that comes next."""
        if self.peek() != "{":
            raise DataError(f"{place}: no row begins here; an array of objects with named fields is valid.")
        while True:
            try:
                _, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                whole = error.pos < len(self.text) - _CLOSE and not error.msg.startswith("Unterminated")
                if len(self.text) - self.at > MAX_BYTES:
                    raise DataError(f"{place}: the row is longer than {MAX_BYTES:,} characters.") from None
                if whole or not self._more():
                    raise DataError(f"{place}: not valid JSON ({error.msg}).") from None
            except RecursionError:
                raise DataError(f"{place}: the row is nested deeper than {MAX_DEPTH} levels.") from None
            except ValueError as error:  # a whole number of thousands of digits
                raise DataError(f"{place}: not valid JSON ({error}).") from None
            else:
                found, self.at = self.text[self.at : end], end
                return found.encode()

    def _more(self) -> bool:
        """Read on, each time as much again as is held, or a row of many blocks would be scanned as often."""
        block = self.file.read(max(BLOCK, len(self.text) - self.at))
        try:
            added = self.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
        self.text, self.at = self.text[self.at :] + added, 0
        return bool(block)
