"""Scores of several answers to one prompt: the prompt is read once, the answers go on from its keys and values."""

from collections.abc import Iterator
from itertools import groupby

import torch

from graftwork.data.sequence import Sequence
from graftwork.inference.scoring import Score, over_data_ranks
from graftwork.models import GPT
from graftwork.models.kv_cache import KVCache
from graftwork.models.scoring import check_tokens, evaluating

MOST_ROWS = 64
"""Rows times answers that are held in one cache."""

Question = tuple[list[int], list[list[int]]]


def questions(rows: list[list[Sequence]]) -> list[Question] | None:
    """Return (prompt ids, ids of each answer) per row; None where a row's sequences do not share their prompt."""
    found = []
    for row in rows:
        start = row[0].answer_start
        prompt = row[0].tokens[:start]
        if any(s.answer_start != start or s.tokens[:start] != prompt or sum(s.loss[:start]) for s in row):
            return None
        found.append((prompt, [s.tokens[start:] for s in row]))
    return found


def score_answers(model: GPT, asked: list[Question], batch_tokens: int = 2048) -> list[list[Score]]:
    """Return the score of every answer of every row, equal to that of the whole sequences; the model is in one piece.

    Prompts of one length are read together, at most ``batch_tokens`` tokens.
    """
    with evaluating(model):
        check_tokens(model, [prompt + max(answers, key=len) for prompt, answers in asked])
        batches = list(_batches(asked, batch_tokens))
        found = over_data_ranks(
            batches, lambda numbers: zip(numbers, _score_batch(model, [asked[n] for n in numbers]), strict=True)
        )
    return [found[number] for number in range(len(asked))]


def _batches(asked: list[Question], budget: int) -> Iterator[list[int]]:
    """Yield row numbers of equal prompt length, the longest first."""

    def length(number: int) -> int:
        return len(asked[number][0])

    for width, group in groupby(sorted(range(len(asked)), key=lambda n: -length(n)), key=length):
        numbers = list(group)
        size = max(1, min(budget // width, MOST_ROWS // max(len(asked[n][1]) for n in numbers)))
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def _score_batch(model: GPT, asked: list[Question]) -> list[list[Score]]:
    """Read the prompts, then every answer token by token; an answer leaves once its last token is scored."""
    going = [(row, k) for row, (_, answers) in enumerate(asked) for k in range(len(answers))]
    losses: dict[tuple[int, int], list[float]] = {pair: [] for pair in going}
    exact = dict.fromkeys(going, True)
    with KVCache(model, len(asked), max(len(p) + max(map(len, answers)) for p, answers in asked)) as cache:
        logits = cache.read([prompt for prompt, _ in asked])
        places = [row for row, _ in going]
        for step in range(max(len(answer) for _, answers in asked for answer in answers)):
            told = torch.log_softmax(logits, -1).double().cpu()
            first = logits.argmax(-1).tolist()
            for place, (row, k) in zip(places, going, strict=True):
                token = asked[row][1][k][step]
                losses[row, k].append(-float(told[place, token]))
                exact[row, k] &= first[place] == token
            kept = [i for i, (row, k) in enumerate(going) if len(asked[row][1][k]) > step + 1]
            if not kept:
                break
            cache.keep([places[i] for i in kept])
            going = [going[i] for i in kept]
            places = list(range(len(going)))
            logits = cache.read([asked[row][0] + asked[row][1][k][: step + 1] for row, k in going])
    return [
        [_answer_score(losses[row, k], exact[row, k]) for k in range(len(answers))]
        for row, (_, answers) in enumerate(asked)
    ]


def _answer_score(losses: list[float], exact: bool) -> Score:
    return Score(loss=sum(losses), tokens=len(losses), likelihood=-sum(losses), exact=exact)
