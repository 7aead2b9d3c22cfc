"""Several files in one epoch, each with the share of its rows that a weight gives it."""

from collections.abc import Sequence

import numpy

from graftwork.errors import ConfigError

FIELD = "train_weights"
MOST_REPEATS = 1000
"""Times that an epoch may hold a row."""


def check_weights(weights: Sequence[int], parts: int) -> None:
    """Raise ConfigError unless there is a positive whole number for each part of ``train``."""
    if len(weights) != parts:
        raise ConfigError(
            f"{FIELD} has {len(weights)} number(s), but train names {parts} file(s) or directories; give one for each."
        )
    if wrong := [one for one in weights if one < 1]:
        raise ConfigError(f"{FIELD} holds {wrong[0]}; whole numbers from 1 on are valid.")


def blended(counts: Sequence[int], weights: Sequence[int], seed: int) -> numpy.ndarray:
    """Return the numbers of the rows of an epoch, int64 [rows]: part i has ``weights[i]`` of every ``sum(weights)``.

    ``counts``: the rows of each part, which are numbered one part after the other. The epoch is the shortest one that
    holds every row: the part with most rows for its weight stands in it once, rows of others are repeated, all equally
    often but for those that ``seed`` draws once more. Raises ConfigError where a row would be repeated too often.
    """
    unit = max(count / weight for count, weight in zip(counts, weights))
    starts = numpy.cumsum([0, *counts])
    chosen = []
    for number, (start, count, weight) in enumerate(zip(starts, counts, weights)):
        wanted = max(count, round(unit * weight))
        if wanted > MOST_REPEATS * count:
            raise ConfigError(
                f"{FIELD}={list(weights)} repeats each of the {count} rows of file {number + 1} {wanted // count} "
                f"times in an epoch; give weights with which it is at most {MOST_REPEATS} times."
            )
        draw = numpy.random.default_rng([seed, number]).permutation(count)[: wanted % count]
        chosen.append(start + numpy.concatenate([numpy.tile(numpy.arange(count), wanted // count), numpy.sort(draw)]))
    return numpy.concatenate(chosen).astype(numpy.int64)
