"""Figures from scores: loss per answer token, exact match, closed-set accuracy with its confusions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from graftwork.inference.scoring import Score


class LabelFigures(TypedDict):
    """Of one label: rows that have it as their answer, the share found, the share right among those it was said of."""

    rows: int
    recall: float | None
    precision: float | None


class Metrics(TypedDict, total=False):
    """Figures of one evaluation, as they are written to JSON; see ``evaluate_model`` for what is always there."""

    rows: int
    dropped: int
    answer_tokens: int
    loss: float
    exact_match: float
    accuracy: float
    labels: dict[str, LabelFigures]
    confusion: dict[str, dict[str, int]]
    tasks: dict[str, "Metrics"]
    adapters: dict[str, "Metrics"]
    baseline: "Metrics"


Paired = Mapping[str, "float | Paired"]
"""Of one figure what it was before and is after; of all tasks and adapters, by their names, the figures of each."""

KINDS: tuple[Literal["tasks", "adapters"], ...] = ("tasks", "adapters")
"""Under what the figures of kinds of rows stand."""

Compared = Literal["loss", "exact_match", "accuracy"]
COMPARED: tuple[Compared, ...] = ("loss", "exact_match", "accuracy")
"""The figures that say how good a model is."""


def answer_metrics(scores: Sequence[Score]) -> Metrics:
    """Return ``rows``, ``answer_tokens``, ``loss`` (per answer token over the set) and ``exact_match`` (0 to 1)."""
    tokens = sum(s.tokens for s in scores)
    return {
        "rows": len(scores),
        "answer_tokens": tokens,
        "loss": sum(s.loss for s in scores) / tokens,
        "exact_match": sum(s.exact for s in scores) / len(scores),
    }


def label_metrics(labels: list[str], expected: list[int], likelihoods: list[list[float]]) -> Metrics:
    """Return ``accuracy``, per label ``rows``, ``recall`` and ``precision``, and ``confusion[expected][predicted]``.

    ``likelihoods[row][label]`` are log-likelihoods; the likeliest label is the prediction. A ratio over no row is None.
    """
    predicted = [max(range(len(labels)), key=row.__getitem__) for row in likelihoods]
    pairs = Counter(zip(expected, predicted, strict=True))
    numbers = range(len(labels))
    hits = [pairs[n, n] for n in numbers]
    asked = [sum(pairs[n, k] for k in numbers) for n in numbers]
    said = [sum(pairs[k, n] for k in numbers) for n in numbers]
    return {
        "accuracy": sum(hits) / len(expected),
        "labels": {
            label: {"rows": asked[n], "recall": _ratio(hits[n], asked[n]), "precision": _ratio(hits[n], said[n])}
            for n, label in enumerate(labels)
        },
        "confusion": {labels[n]: {labels[k]: pairs[n, k] for k in numbers} for n in numbers},
    }


def paired(before: Metrics, after: Metrics) -> dict[str, Paired]:
    """Return ``{metric: {"before": ..., "after": ...}}`` of the figures both have, as a run's summary keeps them.

    Where rows name tasks or adapters, those of each stand under ``tasks`` and ``adapters``.
    """
    found: dict[str, Paired] = {
        n: {"before": before[n], "after": after[n]} for n in COMPARED if n in before and n in after
    }
    for kind in KINDS:
        old, new = before.get(kind, {}), after.get(kind, {})
        if shared := [name for name in new if name in old]:
            found[kind] = {name: paired(old[name], new[name]) for name in shared}
    return found


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
