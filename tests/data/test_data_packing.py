"""Best-fit-decreasing bin packing: legal, tight and deterministic."""

import numpy
import pytest

from graftwork.data.packing import best_fit_decreasing, efficiency


def by_hand(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook's quadratic best fit."""
    bins: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [capacity - sum(lengths[i] for i in b) for b in bins]
        fits = [(r, k) for k, r in enumerate(room) if r >= lengths[sample]]
        if fits:
            bins[min(fits)[1]].append(sample)
        else:
            bins.append([sample])
    return bins


@pytest.mark.parametrize("seed", range(5))
def test_as_good_as_the_textbook(seed):
    lengths = numpy.random.default_rng(seed).integers(1, 65, size=300).tolist()
    bins = best_fit_decreasing(lengths, 64)
    assert sorted(i for b in bins for i in b) == list(range(300))
    assert max(sum(lengths[i] for i in b) for b in bins) <= 64
    assert len(bins) == len(by_hand(lengths, 64))
    assert bins == best_fit_decreasing(numpy.array(lengths, dtype=numpy.int32), 64)


def test_known_case_and_efficiency():
    lengths = [4, 8, 1, 4, 2, 1]
    bins = best_fit_decreasing(lengths, 10)
    assert sorted(map(sorted, bins)) == [[0, 3, 4], [1, 2, 5]]
    assert efficiency(lengths, bins, 10) == 1.0
    assert efficiency(lengths, [*bins, []], 10) == pytest.approx(2 / 3)


def test_full_rows_and_nothing():
    assert best_fit_decreasing([5, 5], 5) == [[0], [1]]
    assert best_fit_decreasing([], 5) == []
