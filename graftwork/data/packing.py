"""Bin packing: which samples share one row of ``seq_length`` tokens."""

import bisect
from collections.abc import Sequence

import numpy


def best_fit_decreasing(lengths: Sequence[int] | numpy.ndarray, capacity: int) -> list[list[int]]:
    """Group sample numbers into bins of at most ``capacity`` tokens.

    Longest first, each into the fullest bin that takes it; equal lengths in file order, so the result is a function
    of the lengths alone. At most 11/9 of the least possible number of bins plus one.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> bins with exactly that much room
    rooms: list[int] = []  # the keys of by_room, sorted
    for sample in numpy.argsort(-numpy.asarray(lengths), kind="stable").tolist():
        length = int(lengths[sample])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            bins.append([])
            chosen, room = len(bins) - 1, capacity
        else:
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        bins[chosen].append(sample)
        left = room - length
        if left > 0:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(chosen)
    return bins


def efficiency(lengths: Sequence[int] | numpy.ndarray, bins: list[list[int]], capacity: int) -> float:
    """Share of the packed positions that hold a token, 0..1."""
    return float(numpy.sum(lengths)) / (len(bins) * capacity) if bins else 1.0
