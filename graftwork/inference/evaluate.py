"""evaluate: loss, exact match and closed-set accuracy of a model on rows with known answers."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Unpack

from graftwork.data import SFTDataModule
from graftwork.errors import ConfigError, DataError
from graftwork.inference.examples import Examples, Kind, Templates
from graftwork.inference.labels import questions, score_answers
from graftwork.inference.metrics import Metrics, answer_metrics, label_metrics
from graftwork.inference.output import write_text
from graftwork.inference.scoring import Score, score
from graftwork.models import Model, load
from graftwork.models.generation.scoring import one_piece
from graftwork.routes import Routes

SHARED_FROM = 4
"""From so many labels on, reading each prompt once pays; with two, fewer but larger batches take the same time."""


def evaluate(
    base: str,
    data: str,
    adapter: Optional[str] = None,
    prompt_template: Optional[str] = None,
    answer_template: Optional[str] = None,
    labels: Optional[list[str]] = None,
    baseline: bool = False,
    limit: Optional[int] = None,
    dtype: Optional[str] = "auto",
    batch_tokens: int = 2048,
    output: Optional[str] = None,
    row_layout: Optional[str] = None,
) -> Metrics:
    """Evaluate a base model, with an adapter or without, on rows with known answers.

    Returns what ``evaluate_model`` does. Raises GraftworkError.

    Args:
        base: A checkpoint directory, a registered model or a name on Hugging Face's hub.
        data: File or directory of rows with answers.
        adapter: Directory of an adapter; without one the base is evaluated.
        prompt_template: How a prompt is put; default as the adapter was trained.
        answer_template: How an answer follows it, likewise.
        labels: The closed set of answers; found by itself where at most 20 answers repeat.
        baseline: Adds the figures without adapters.
        limit: Most rows of the file.
        dtype: ``bf16``, ``fp32`` or ``auto``, the checkpoint's.
        batch_tokens: Tokens that are scored together.
        output: JSON file to write.
        row_layout: Name of the layout the rows have; default their columns tell.
    """
    examples = Examples.from_file(data, prompt_template, answer_template, limit, row_layout=row_layout)
    model = load(base, dtype=dtype)
    if adapter is not None:
        model.load_adapters(adapter)
    metrics = evaluate_model(model, examples, labels, batch_tokens=batch_tokens)
    if baseline:
        with model.adapters_disabled():
            metrics["baseline"] = evaluate_model(model, examples, labels, batch_tokens=batch_tokens)
    if output is not None:
        write_text(output, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    return metrics


def evaluate_model(
    model: Model,
    data: SFTDataModule | Examples | str | Path,
    labels: list[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_tokens: int = 2048,
    **templates: Unpack[Templates],
) -> Metrics:
    """Return the figures of ``model`` as it is now: adapters on, merged, or off inside ``adapters_disabled()``.

    ``data`` is a data module (its ``split``: test, else validation), a file (templates: ``prompt_template`` and
    ``answer_template``, else those the adapters were trained with) or Examples. Always: ``rows``, ``dropped``,
    ``answer_tokens``, ``loss`` per answer token over the whole set, ``exact_match`` of greedy answers, end token
    included. Where answers are a closed set: ``accuracy``, ``labels`` and ``confusion`` from the log-likelihood of each
    label. Where rows name a task, ``tasks`` holds the figures of each, found as if its rows were alone; a row's label
    is then one of its own task's. Where rows name adapters, those act alone, and ``adapters`` holds the figures of each
    (``a+b`` of two, ``base`` of none, ``all`` of rows that name nobody).
    """
    examples = _examples(data, split, limit, templates)
    model.configure_model()
    given = None if labels is None else _distinct(labels)
    found = {kind: _figures(model, examples, kind, given, batch_tokens) for kind in examples.kinds}
    metrics = _joined(list(found.values()))
    if tasks := _each(found, lambda kind: kind.task):
        metrics["tasks"] = tasks
    if any(kind.way is not None for kind in found):
        metrics["adapters"] = _each(found, lambda kind: kind.who)
    return metrics


def _each(found: Mapping[Kind, "_Figures"], named: Callable[[Kind], str | None]) -> dict[str, Metrics]:
    """Return the figures of the rows of each name."""
    names = list(dict.fromkeys(name for kind in found if (name := named(kind)) is not None))
    return {name: _joined([figures for kind, figures in found.items() if named(kind) == name]) for name in names}


@dataclass(frozen=True)
class _Figures:
    """Scores of the rows of one kind that were not dropped: of the right answer, and of each label where there are."""

    right: list[Score]
    dropped: int
    labels: list[str] | None
    expected: list[int]
    likelihoods: list[list[float]]


def _figures(model: Model, every: Examples, kind: Kind, labels: list[str] | None, batch_tokens: int) -> _Figures:
    examples = every.of_kind(kind)
    chosen = examples.closed_set() if labels is None else labels
    expected = [0] * len(examples.rows) if chosen is None else examples.expected(chosen)
    with model.routed(None if kind.way is None else Routes.of_rows([kind.way])):
        found = _scores(model, examples, chosen, batch_tokens)
    return _Figures(
        right=[row[expected[i]] for i, row in found.items()],
        dropped=len(examples.rows) - len(found),
        labels=chosen,
        expected=[expected[i] for i in found],
        likelihoods=[[value.likelihood for value in row] for row in found.values()],
    )


def _joined(found: list[_Figures]) -> Metrics:
    """Return the figures over all rows; labels, which may be those of several tasks, where every task has some."""
    metrics = answer_metrics([score for part in found for score in part.right])
    metrics["dropped"] = sum(part.dropped for part in found)
    sets = [part.labels for part in found if part.labels is not None]
    if len(sets) < len(found):
        return metrics
    labels = list(dict.fromkeys(label for one in sets for label in one))
    expected, likelihoods = [], []
    for part, own in zip(found, sets, strict=True):
        expected += [labels.index(own[number]) for number in part.expected]
        for row in part.likelihoods:
            values = dict(zip(own, row, strict=True))
            likelihoods.append([values.get(label, -math.inf) for label in labels])
    return metrics | label_metrics(labels, expected, likelihoods)


def _scores(model: Model, examples: Examples, labels: list[str] | None, batch_tokens: int) -> dict[int, list[Score]]:
    """Return per row number the score of each label (of the right answer alone where there are no labels)."""
    rows = examples.references(model) if labels is None else examples.candidates(model, labels)
    kept = {i: [s for s in row if s is not None] for i, row in enumerate(rows) if None not in row}
    if not kept:
        raise DataError(f"all {len(rows)} rows were dropped as longer than seq_length; raise it.")
    sharing = labels is not None and len(labels) >= SHARED_FROM and one_piece(model)
    asked = questions(list(kept.values())) if sharing else None
    if asked is not None:
        return dict(zip(kept, score_answers(model, asked, batch_tokens), strict=True))
    scores = iter(score(model, [sequence for row in kept.values() for sequence in row], batch_tokens))
    return {i: [next(scores) for _ in row] for i, row in kept.items()}


def _examples(
    data: SFTDataModule | Examples | str | Path, split: str | None, limit: int | None, templates: Templates
) -> Examples:
    if isinstance(data, Examples):
        return data
    if isinstance(data, SFTDataModule):
        return Examples.from_data(data, split, limit)
    return Examples.from_file(str(data), limit=limit, **templates)


def _distinct(labels: list[str]) -> list[str]:
    if len(set(labels)) < max(2, len(labels)):
        raise ConfigError(f"labels are {labels}, but at least two different ones are needed, each once.")
    return labels
