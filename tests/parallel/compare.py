"""Compares what the ranks of a layout saw with one process: the largest relative difference of each figure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.parallel.cells import Outcome

TOLERANCE = 1e-5
"""fp32; of a tensor: its largest difference over its largest value."""
Figures = dict[str, float]


def differences(ranks: Sequence[Outcome], wanted: Outcome) -> Figures:
    """Return figure -> worst relative difference over ranks, steps and tensors; initial values must be bit-equal.

    Raises AssertionError when the ranks together do not know exactly the tensors that one process knows.
    """
    assert_born_equal([rank.initial for rank in ranks], wanted.initial)
    figures: Figures = {}
    for name in ("validation", "losses", "norms"):
        wanted_numbers = torch.tensor(getattr(wanted, name), dtype=torch.float64)
        found = [torch.tensor(getattr(rank, name), dtype=torch.float64) for rank in ranks]
        figures[name] = max(elementwise(f, wanted_numbers) for f in found)
    figures["logits"] = max(tensorwise(rank.logits, wanted.logits) for rank in ranks)
    figures["gradients"] = _worst([rank.gradients for rank in ranks], wanted.gradients)
    figures["weights"] = _worst([rank.weights for rank in ranks], wanted.weights)
    return figures


def assert_faithful(figures: Figures) -> None:
    """Raise AssertionError naming the figures that differ too much."""
    wrong = {name: value for name, value in figures.items() if not value <= TOLERANCE}
    assert not wrong, f"differs from one process by more than {TOLERANCE}: {wrong}"


def assert_born_equal(ranks: Sequence[dict[str, Tensor]], wanted: dict[str, Tensor]) -> None:
    """Every rank's full tensors are those of one process, bit for bit."""
    _assert_all_known(ranks, wanted)
    for known in ranks:
        unequal = [name for name, tensor in known.items() if not torch.equal(tensor, wanted[name])]
        assert not unequal, f"initial values differ: {unequal}"


def elementwise(found: Tensor, wanted: Tensor) -> float:
    """Return the largest |found - wanted| / |wanted|."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(((found - wanted).abs() / wanted.abs().clamp(min=1e-12)).max()) if wanted.numel() else 0.0


def tensorwise(found: Tensor | None, wanted: Tensor | None) -> float:
    """Return max |found - wanted| / max |wanted|."""
    assert found is not None and wanted is not None and found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _worst(ranks: Sequence[dict[str, Tensor]], wanted: dict[str, Tensor]) -> float:
    _assert_all_known(ranks, wanted)
    return max((tensorwise(t, wanted[name]) for known in ranks for name, t in known.items()), default=0.0)


def _assert_all_known(ranks: Sequence[dict[str, Tensor]], wanted: dict[str, Tensor]) -> None:
    known = set().union(*ranks)
    assert known == set(wanted), f"only there or only in one process: {sorted(known ^ set(wanted))[:5]}"
