"""One token sequence with its loss mask, and how it is cut to a length."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from graftwork.errors import DataError


class TooLong(DataError):
    """What must be kept of a row does not fit into the length that ``option`` sets."""

    def __init__(self, message: str, option: str = "seq_length") -> None:
        super().__init__(message)
        self.option = option


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

    @property
    def learned_start(self) -> int:
        """Where the first run of learned tokens begins (the length where nothing is learned)."""
        return next((i for i, learned in enumerate(self.loss) if learned), len(self))

    def cut(self, length: int) -> int:
        """Take loose tokens before the last answer away, the leftmost first; return how many went.

        One token stays before the answer, else its first token could not be predicted.
        Raises TooLong when that does not suffice.
        """
        excess = len(self) - length
        if excess <= 0:
            return 0
        start = self.answer_start
        if excess > self._spare(start):
            raise TooLong(
                f"the answer has {len(self) - start} tokens and {start - self._loose(start)} more must be kept before "
                f"it, which does not fit into seq_length={length}"
            )
        return self._shorten(excess)

    def cut_apart(self, length: int, answer_length: int) -> int:
        """As ``cut`` where the prompt and the answer are rows of their own, each with its length."""
        start = self.answer_start
        if len(self) - start > answer_length:
            said = f"the answer has {len(self) - start} tokens, which does not fit into answer_length={answer_length}"
            raise TooLong(said, "answer_length")
        if start - length > self._spare(start):
            raise TooLong(
                f"{start - self._loose(start)} tokens of the prompt must be kept, "
                f"which does not fit into seq_length={length}"
            )
        return self._shorten(start - length)

    def _loose(self, start: int) -> int:
        return sum(self.loose[:start])

    def _spare(self, start: int) -> int:
        """How many tokens before ``start`` may go: one stays."""
        loose = self._loose(start)
        return max(0, loose - (loose == start))

    def _shorten(self, excess: int) -> int:
        """Take the first ``excess`` loose tokens away and return how many went."""
        if excess <= 0:
            return 0
        gone = set([i for i, loose in enumerate(self.loose) if loose][:excess])
        stay = [i for i in range(len(self)) if i not in gone]
        self.tokens = [self.tokens[i] for i in stay]
        self.loss = [self.loss[i] for i in stay]
        self.loose = [self.loose[i] for i in stay]
        return excess
