"""Scores of several answers to one prompt: the prompt is read once, the answers go on from its keys and values."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.data.sequence import Sequence
from graftwork.inference.scoring import Score, over_data_ranks
from graftwork.models.generation.protocol import CausalModel
from graftwork.models.generation.reading import heads, reader
from graftwork.models.generation.scoring import check_tokens, evaluating

MOST_ROWS = 64
"""Rows times answers that are held in one cache."""

WIDEST_GAP = 16
"""A prompt at most this much longer than its batch's shortest reads on token by token beside the others' answers."""


@dataclass(frozen=True)
class Question:
    """Ids of a prompt, and of each answer that may follow it."""

    prompt: list[int]
    answers: list[list[int]]


def questions(rows: list[list[Sequence]]) -> list[Question] | None:
    """Return a question per row; None where a row's sequences do not share their prompt."""
    found = []
    for row in rows:
        start = row[0].answer_start
        prompt = row[0].tokens[:start]
        if any(s.answer_start != start or s.tokens[:start] != prompt or sum(s.loss[:start]) for s in row):
            return None
        found.append(Question(prompt, [s.tokens[start:] for s in row]))
    return found


def score_answers(model: CausalModel, asked: list[Question], batch_tokens: int = 2048) -> list[list[Score]]:
    """Return the score of every answer of every row, equal to that of the whole sequences; the model is in one piece.

    Prompts of similar length are read together, at most ``batch_tokens`` tokens.
    """
    with evaluating(model):
        check_tokens(model, [question.prompt + max(question.answers, key=len) for question in asked])
        batches = list(_batches(asked, batch_tokens))
        found = over_data_ranks(
            batches, lambda numbers: zip(numbers, _score_batch(model, [asked[n] for n in numbers]), strict=True)
        )
    return [found[number] for number in range(len(asked))]


@dataclass
class _Answer:
    """An answer's tokens and what the model thought of those it has seen."""

    tokens: list[int]
    losses: list[float] = field(default_factory=list)
    exact: bool = True

    @property
    def score(self) -> Score:
        return Score(sum(self.losses), len(self.losses), likelihood=-sum(self.losses), exact=self.exact)


@dataclass(frozen=True)
class _Path:
    """One row of the cache: a prompt (a decoder's start) on the way to its answers, or a prompt and one of them."""

    prompt: list[int]
    answers: list[_Answer]

    @property
    def longest(self) -> int:
        """Number of tokens of the prompt with its longest answer."""
        return len(self.prompt) + max(len(answer.tokens) for answer in self.answers)

    def upto(self, position: int) -> list[int]:
        """Return the first ``position`` tokens."""
        answer = self.answers[0].tokens if position > len(self.prompt) else []
        return [*self.prompt, *answer][:position]

    def next(self, position: int) -> list[tuple[_Answer, int]]:
        """Return the answers that have a token after ``position`` tokens, each with it; none inside the prompt."""
        step = position - len(self.prompt)
        return [(answer, answer.tokens[step]) for answer in self.answers] if step >= 0 else []

    def onward(self, position: int) -> list["_Path"]:
        """Return the rows that read on after ``position`` tokens: this prompt, or one for each unfinished answer."""
        if position < len(self.prompt):
            return [self]
        unfinished = [a for a in self.answers if len(self.prompt) + len(a.tokens) > position + 1]
        return [_Path(self.prompt, [answer]) for answer in unfinished]


def _batches(asked: list[Question], budget: int) -> Iterator[list[int]]:
    """Yield row numbers of similar prompt length, the shortest first."""
    most = MOST_ROWS // max(len(question.answers) for question in asked)
    batch: list[int] = []
    for number in sorted(range(len(asked)), key=lambda n: len(asked[n].prompt)):
        width = len(asked[number].prompt)
        full = len(batch) >= most or (len(batch) + 1) * width > budget
        if batch and (full or width - len(asked[batch[0]].prompt) > WIDEST_GAP):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _score_batch(model: CausalModel, asked: list[Question]) -> list[list[Score]]:
    """Advance all rows one position at a time: prompts read on and branch into answers, finished answers leave."""
    found = [[_Answer(tokens) for tokens in question.answers] for question in asked]
    # A cache row is first a prompt with all its answers. Once the prompt is read, its logits are those before every
    # answer's first token; then the row is copied, one copy for each answer that has more tokens. Since a row stands
    # only for tokens it has read, neither padding nor a mask is ever needed.
    prompts = [question.prompt for question in asked]
    paths = [_Path(head, answers) for head, answers in zip(heads(model, prompts), found, strict=True)]
    position = min(len(path.prompt) for path in paths)
    with reader(model, prompts, max(path.longest for path in paths), cached=True) as cache:
        while paths:
            logits = cache.read([path.upto(position) for path in paths])
            _count(logits, [(place, *pair) for place, path in enumerate(paths) for pair in path.next(position)])
            onward = [(place, path) for place, old in enumerate(paths) for path in old.onward(position)]
            places, paths = [place for place, _ in onward], [path for _, path in onward]
            if paths and places != list(range(len(logits))):
                cache.keep(places)
            position += 1
    return [[answer.score for answer in answers] for answers in found]


def _count(logits: Tensor, picks: list[tuple[int, _Answer, int]]) -> None:
    """Note what the logits [b, v] say of each picked (row, answer, its next token)."""
    if not picks:
        return
    rows = logits[torch.tensor([place for place, _, _ in picks], device=logits.device)]
    targets = torch.tensor([token for _, _, token in picks], device=logits.device)
    losses, right = F.cross_entropy(rows, targets, reduction="none"), rows.argmax(-1) == targets
    for (_, answer, _), loss, hit in zip(picks, losses.tolist(), right.tolist(), strict=True):
        answer.losses.append(loss)
        answer.exact &= hit
