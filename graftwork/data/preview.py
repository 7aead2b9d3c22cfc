"""A few rows as questions: what a training run asks its model now and then."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy

from graftwork.batch import IGNORED, Questions
from graftwork.data.rows import LearnedRows, Sample
from graftwork.data.tokenizer import Tokenizer
from graftwork.virtual_tokens import VIRTUAL_BASE


@dataclass(frozen=True)
class Preview:
    """Questions, their right answers, and the tokenizer that reads both."""

    questions: Questions
    tokenizer: Tokenizer

    @classmethod
    def of(cls, rows: LearnedRows, count: int, tokenizer: Tokenizer) -> "Preview":
        """Take ``count`` rows, or all where there are fewer, evenly over the file: the same on every rank."""
        chosen = sorted({number * len(rows) // count for number in range(count)})
        samples = rows.samples(chosen)
        parts = [_parted(sample) for sample in samples]
        questions = Questions(
            prompts=[prompt for prompt, _ in parts],
            inputs=[_text(prompt, tokenizer) for prompt, _ in parts],
            outputs=[_text(answer, tokenizer) for _, answer in parts],
            rows=[sample.row for sample in samples],
            ways=[sample.way for sample in samples],
        )
        return cls(questions, tokenizer)

    def read(self, answers: Iterable[Sequence[int]]) -> list[str]:
        """Return token ids as text."""
        return [_text(answer, self.tokenizer) for answer in answers]


def _parted(sample: Sample) -> tuple[list[int], list[int]]:
    """Return (prompt, answer): the answer is what a decoder gives, else the last run of tokens with a loss."""
    tokens: list[int] = sample.tokens.tolist()
    if sample.answer:
        return tokens[: -sample.answer], tokens[-sample.answer :]
    learned = numpy.flatnonzero(sample.labels != IGNORED) + 1  # labels[t] is token t + 1
    gaps = numpy.flatnonzero(numpy.diff(learned) > 1)
    start = int(learned[gaps[-1] + 1] if len(gaps) else learned[0])
    return tokens[:start], tokens[start : int(learned[-1]) + 1]


def _text(tokens: Iterable[int], tokenizer: Tokenizer) -> str:
    real = [token for token in tokens if token < VIRTUAL_BASE]
    return tokenizer.batch_decode([real], skip_special_tokens=True)[0].strip()
