"""Where a row stands, as errors name it."""

from typing import NamedTuple


class Place(NamedTuple):
    """Where a row stands: file, unit ("line" or "row") and its 1-based number."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"
