"""What a plan finds wrong."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that would go wrong or waste a run; ``field``: the recipe's path to change, as ``show`` prints it."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message
