"""Sharding: cut and join are inverse, padding is zero, blocks are cut each on its own, reads touch only their slice."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from graftwork.errors import ParallelismError
from graftwork.parallel.sharding import Sharding

CASES = [
    Sharding((6, 4)),
    Sharding((8, 4), dim=0),
    Sharding((4, 8), dim=1),
    Sharding((16, 3), dim=0, blocks=2),
    Sharding((7, 3), dim=0, padded=8),
    Sharding((3, 3), dim=0, padded=8),
]


def full(sharding: Sharding) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(sharding.shape).numel()).reshape(sharding.shape)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sharding", CASES, ids=str)
def test_join_is_the_inverse_of_take(sharding: Sharding, size: int) -> None:
    whole = full(sharding)
    parts = [sharding.take(whole, rank, size) for rank in range(size)]
    assert all(tuple(p.shape) == sharding.local_shape(size) for p in parts)
    assert torch.equal(sharding.join(parts), whole)


@pytest.mark.parametrize("sharding", CASES, ids=str)
def test_reading_from_a_file_equals_cutting(sharding: Sharding, tmp_path: Path) -> None:
    whole = full(sharding)
    save_file({"w": whole}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        for rank in range(2):
            assert torch.equal(sharding.read(file.get_slice("w"), rank, 2), sharding.take(whole, rank, 2))


def test_reading_touches_only_its_slice() -> None:
    class Source:
        asked: list[object] = []

        def get_shape(self) -> list[int]:
            return [16, 3]

        def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
            self.asked.append(index)
            return torch.zeros(16, 3)[index]

    Sharding((16, 3), dim=0, blocks=2).read(Source(), 1, 2)
    assert Source.asked == [(slice(4, 8), slice(None)), (slice(12, 16), slice(None))]


def test_gated_halves_are_cut_each_on_its_own() -> None:
    whole = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    assert Sharding((8,), dim=0, blocks=2).take(whole, 1, 2).tolist() == [2, 3, 12, 13]
    assert Sharding((8,), dim=0).take(whole, 1, 2).tolist() == [10, 11, 12, 13]


def test_the_padding_of_a_vocabulary_is_zero_on_the_last_ranks() -> None:
    sharding = Sharding((5, 2), dim=0, padded=8)
    last = sharding.take(torch.ones(5, 2), 3, 4)
    assert sharding.slices(3, 4) == [slice(5, 5)]
    assert float(last.sum()) == 0.0
    assert float(sharding.take(torch.ones(5, 2), 2, 4).sum()) == 2.0


@pytest.mark.parametrize(
    ("sharding", "size"),
    [(Sharding((7, 3), dim=0), 2), (Sharding((8, 3), dim=0, blocks=2), 8), (Sharding((7, 3), dim=0, padded=9), 2)],
)
def test_uneven_cuts_are_refused(sharding: Sharding, size: int) -> None:
    with pytest.raises(ParallelismError, match="must be a multiple of"):
        sharding.local_shape(size)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ParallelismError, match="shape"):
        Sharding((8, 3), dim=0).take(torch.zeros(8, 4), 0, 2)
    with pytest.raises(ParallelismError, match="padding"):
        Sharding((8, 3), dim=0, padded=7)
