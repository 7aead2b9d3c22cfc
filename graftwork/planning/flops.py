"""Floating-point operations of a training step, counted in the graph that runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from graftwork.planning.samples import Kind, Sample
from graftwork.planning.trace import Trace
from graftwork.planning.workload import Workload


@dataclass(frozen=True)
class Flops:
    """FLOPs of one microbatch: forward, gradients of data and of the weights that train, forward run again.

    ``attention``: the part of ``forward`` for products of queries with keys and values.
    """

    forward: float = 0.0
    data: float = 0.0
    weights: float = 0.0
    again: float = 0.0
    attention: float = 0.0

    @property
    def model(self) -> float:
        """What the model takes, without what recomputation repeats."""
        return self.forward + self.data + self.weights

    @property
    def total(self) -> float:
        """All that is computed."""
        return self.model + self.again

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def times(self, factor: float) -> "Flops":
        """Return those of ``factor`` such things."""
        return Flops(*(factor * value for value in vars(self).values()))


@dataclass(frozen=True)
class GraphFlops:
    """FLOPs of a microbatch in one layer of each kind, and outside of the layers."""

    layers: dict[Kind, Flops]
    outside: Flops

    @property
    def whole(self) -> Flops:
        """Those of the whole model."""
        return sum((one.times(len(kind.layers)) for kind, one in self.layers.items()), self.outside)

    def times(self, factor: float) -> "GraphFlops":
        """Return those of ``factor`` such microbatches."""
        layers = {kind: one.times(factor) for kind, one in self.layers.items()}
        return GraphFlops(layers, self.outside.times(factor))


def count(sample: Sample, workload: Workload, recompute: str | None) -> GraphFlops:
    """Count a microbatch's FLOPs; ``sample`` recomputes nothing, what ``recompute`` runs again is added."""
    targets = workload.targets()
    trained = _traces(sample, workload, targets)
    with _nothing_trains(sample.model):
        still = _traces(sample, workload, targets)
    layers = {
        kind: _flops(_minus(trained[kind], trained[None]), _minus(still[kind], still[None]), recompute)
        for kind in sample.standing
    }
    outside = _flops(trained[None], still[None], None)
    for kind, one in layers.items():
        outside += Flops(one.forward, one.data, one.weights, 0.0, one.attention).times(-sample.base(kind))
    return GraphFlops(layers, outside)


def _traces(sample: Sample, workload: Workload, targets: int) -> dict[Kind | None, Trace]:
    return {kind: sample.run(workload, targets, kind) for kind in (None, *sample.standing)}


def _flops(trained: Trace, still: Trace, recompute: str | None) -> Flops:
    """Tell the parts of a backward pass apart: where nothing trains there are gradients of data alone."""
    again = {"full": trained.forward, "selective": trained.attention}.get(recompute or "", 0.0)
    return Flops(trained.forward, still.backward, trained.backward - still.backward, again, trained.attention)


def _minus(a: Trace, b: Trace) -> Trace:
    return Trace(*(x - y for x, y in zip(vars(a).values(), vars(b).values())))


@contextmanager
def _nothing_trains(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
