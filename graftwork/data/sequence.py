"""One token sequence with its loss mask, and how it is cut to a length."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from graftwork.errors import DataError


class TooLong(DataError):
    """What must be kept of a row does not fit into ``seq_length``."""


@dataclass
class Sequence:
    """Token ids; ``loss`` marks tokens to predict, ``loose`` those that a cut may take away."""

    tokens: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)
    loose: list[bool] = field(default_factory=list)

    def extend(self, ids: Iterable[int], *, loss: bool = False, loose: bool = False) -> None:
        """Append ``ids`` with one mark each."""
        ids = list(ids)
        self.tokens += ids
        self.loss += [loss] * len(ids)
        self.loose += [loose] * len(ids)

    def join(self, other: "Sequence", skip: int = 0) -> None:
        """Append ``other`` without its first ``skip`` tokens."""
        self.tokens += other.tokens[skip:]
        self.loss += other.loss[skip:]
        self.loose += other.loose[skip:]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def answer_start(self) -> int:
        """Where the last run of learned tokens begins (the length where nothing is learned)."""
        end = next((i for i in range(len(self), 0, -1) if self.loss[i - 1]), 0)
        if end == 0:
            return len(self)
        return next((i for i in range(end, 0, -1) if not self.loss[i - 1]), 0)

    def cut(self, length: int) -> int:
        """Take loose tokens before the last answer away, the leftmost first; return how many went.

        One token stays before the answer, else its first token could not be predicted.
        Raises TooLong when that does not suffice.
        """
        excess = len(self) - length
        if excess <= 0:
            return 0
        start = self.answer_start
        loose = [i for i in range(start) if self.loose[i]]
        spare = len(loose) - (len(loose) == start)
        if excess > spare:
            kept = start - len(loose)
            raise TooLong(
                f"the answer has {len(self) - start} tokens and {kept} more must be kept before it, "
                f"which does not fit into seq_length={length}"
            )
        gone = set(loose[:excess])
        stay = [i for i in range(len(self)) if i not in gone]
        self.tokens = [self.tokens[i] for i in stay]
        self.loss = [self.loss[i] for i in stay]
        self.loose = [self.loose[i] for i in stay]
        return excess
