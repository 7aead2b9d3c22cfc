"""Ranges of a flat tensor become blocks that make up the tensor: every element once, at its own place."""

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from graftwork import parallel
from graftwork.parallel import sharded_tensor
from graftwork.parallel.flat_range import boxes, flat_range
from graftwork.parallel.sharded_files import parts_of
from graftwork.parallel.sharding import Sharding

SHAPES = [(), (7,), (1, 5), (6, 4), (3, 1, 5), (4, 3, 2, 3)]


def slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(offsets, sizes))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_are_the_range_in_order_and_few(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(max(1, int(torch.Size(shape).numel()))).view(shape)
    for start in range(numbers.numel()):
        for stop in range(start, numbers.numel() + 1):
            found = list(boxes(shape, start, stop))
            read = [n for box in found for n in numbers[slices(*box)].flatten().tolist()]
            assert read == list(range(start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize(
    ("sharding", "rank"),
    [
        (Sharding((8, 6), 0, blocks=2), 1),
        (Sharding((6, 8), 1, blocks=2), 0),
        (Sharding((8, 6), 1), 1),
        (Sharding((10,), 0), 1),
        (Sharding((4, 6)), 0),
    ],
    ids=["gated", "blocks of columns", "columns", "vector", "whole"],
)
def test_pieces_of_a_cut_tensor_stand_where_its_parts_do(
    sharding: Sharding, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_tensor, "dp_rank", lambda **_: 1)
    monkeypatch.setattr(parallel, "tp_size", lambda: 2)
    full = torch.randn(sharding.shape)
    local = sharding.take(full, rank, 2).contiguous()
    entry = sharded_tensor.sharded_tensor("weight", local.to("meta"), sharding, (rank, 2))
    generator = random.Random(0)
    cuts = [0, *sorted(generator.sample(range(1, local.numel()), 3)), local.numel()]
    made, seen = torch.full(sharding.shape, torch.nan), torch.zeros(sharding.shape)
    for start, stop in pairwise(cuts):
        for block in flat_range(entry, local.flatten()[start:stop], start):
            assert isinstance(block.data, Tensor) and block.replica_id[-1] == 0 and not block.has_regular_grid
            made[slices(block.global_offset, block.local_shape)] = block.data
            seen[slices(block.global_offset, block.local_shape)] += 1
    wanted = torch.full(sharding.shape, torch.nan)
    for part in parts_of(sharded_tensor.sharded_tensor("weight", local, sharding, (rank, 2))):
        wanted[slices(part.global_offset, part.local_shape)] = part.data
    assert torch.equal(made.nan_to_num(), wanted.nan_to_num()) and int(seen.sum()) == local.numel()
    assert float(seen.max()) == 1
