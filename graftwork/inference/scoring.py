"""Teacher forcing: the loss of every learned token, and whether greedy decoding would give the answer."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork import parallel
from graftwork.batch import IGNORED
from graftwork.data.sequence import Sequence
from graftwork.models.generation.protocol import CausalModel
from graftwork.models.generation.scoring import check_tokens, device_of, evaluating, target_logits
from graftwork.parallel.collective import all_gather_objects

Value = TypeVar("Value")


@dataclass(frozen=True)
class Score:
    """What a model thinks of one sequence: ``loss`` is summed over its ``tokens`` learned tokens.

    ``likelihood`` is the log-likelihood of the last answer, its end token included; ``exact`` tells whether every
    token of it is the model's first choice given the ones before, which is what greedy decoding would say.
    """

    loss: float
    tokens: int
    likelihood: float
    exact: bool


def score(model: CausalModel, sequences: list[Sequence], batch_tokens: int = 2048) -> list[Score]:
    """Return the score of each sequence; batches hold rows of similar length, at most ``batch_tokens`` tokens.

    Data-parallel ranks share the work and all get every score. Raises ConfigError for a row beyond the context.
    """
    with evaluating(model):
        check_tokens(model, [sequence.tokens for sequence in sequences])
        batches = list(_batches([len(sequence) for sequence in sequences], batch_tokens))
        found = over_data_ranks(
            batches, lambda numbers: zip(numbers, _score_batch(model, [sequences[n] for n in numbers]), strict=True)
        )
    return [found[number] for number in range(len(sequences))]


def over_data_ranks(
    batches: list[list[int]], work: Callable[[list[int]], Iterable[tuple[int, Value]]]
) -> dict[int, Value]:
    """Share batches of row numbers over data-parallel ranks and return every row's value on each of them."""
    # Experts are spread over data-parallel ranks, which then have to run the same batches.
    alone = parallel.ep_size() > 1
    mine = batches if alone else batches[parallel.dp_rank() :: parallel.dp_size()]
    found = {number: value for numbers in mine for number, value in work(numbers)}
    shared = [found] if alone else all_gather_objects(found, parallel.dp_group())
    return {number: value for part in shared for number, value in part.items()}


def _batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Yield row numbers, longest rows first, so that rows x longest row stays within ``budget``."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _score_batch(model: CausalModel, sequences: list[Sequence]) -> list[Score]:
    # A conversation is learned in several places: what follows the first of them is laid out as an answer.
    cuts = [(s, max(1, s.learned_start)) for s in sequences]
    prompts, answers = [s.tokens[:at] for s, at in cuts], [s.tokens[at:] for s, at in cuts]
    batch = model.lay_out(prompts, answers, device_of(model))
    batch = batch.learning([learned for s, at in cuts for learned in s.loss[at:]])
    logits, targets = target_logits(model, batch), batch.labels[batch.labels != IGNORED]
    losses = F.cross_entropy(logits, targets, reduction="none").double().cpu()
    right = (logits.argmax(-1) == targets).cpu()
    counts = [sum(s.loss[1:]) for s in sequences]
    parts = zip(sequences, losses.split(counts), right.split(counts), strict=True)
    return [_score(sequence, loss, hit) for sequence, loss, hit in parts]


def _score(sequence: Sequence, losses: Tensor, right: Tensor) -> Score:
    """``losses`` and ``right`` [learned tokens]; the last answer is their tail."""
    answer = sum(sequence.loss[max(1, sequence.answer_start) :])
    first = len(losses) - answer
    return Score(
        loss=float(losses.sum()),
        tokens=len(losses),
        likelihood=-float(losses[first:].sum()),
        exact=bool(torch.all(right[first:])),
    )
