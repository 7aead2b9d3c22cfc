"""Bytes of activations on a rank: what each layer saves for the backward pass, and what comes on top at the peak."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from graftwork.layout import Layout
from graftwork.planning.samples import Kind, Sample
from graftwork.planning.trace import Weigh
from graftwork.planning.workload import Workload


@dataclass(frozen=True)
class Activations:
    """Bytes of one microbatch on a tensor-parallel rank.

    layers: saved by a layer of each kind; outside: saved by embeddings and what all layers share; transient: above
    those saved while a layer runs backward; logits: what output layer and loss add to the peak.
    """

    layers: Mapping[Kind, float]
    outside: float
    transient: float
    logits: float

    def of(self, layers: Iterable[tuple[str, int]]) -> float:
        """Return what ``layers`` save, each a part and an index in it."""
        chosen = list(layers)
        return sum(
            size * sum(part == kind.part and index in kind.layers for part, index in chosen)
            for kind, size in self.layers.items()
        )

    def times(self, factor: float) -> "Activations":
        """Return those of so many times the tokens."""
        layers = {kind: factor * size for kind, size in self.layers.items()}
        return Activations(layers, *(factor * size for size in (self.outside, self.transient, self.logits)))


def measure(sample: Sample, workload: Workload, layout: Layout) -> Activations:
    """Measure a microbatch on a rank of ``layout``, which ``sample`` is cut for."""
    context = layout.context_parallel_size
    weigh = _weigh(layout, sample.model.shape.hidden_size)
    # The first run fills caches of the rotary positions, which stay: that is seen once, at the peak.
    many = sample.run(workload, workload.targets(context), None, context, weigh)
    few = sample.run(workload, 1, None, context, weigh)
    layers = {kind: sample.run(workload, 1, kind, context, weigh).saved - few.saved for kind in sample.standing}
    inside = sum(sample.base(kind) * size for kind, size in layers.items())
    return Activations(layers, few.saved - inside, few.peak - few.saved, max(0.0, many.peak - few.peak))


def _weigh(layout: Layout, hidden: int) -> Weigh:
    """Tensors of the hidden size lie along the sequence between the tensor-parallel regions."""
    if not layout.sequence_parallel:
        return lambda _: 1.0
    part = 1 / layout.tensor_model_parallel_size

    def weigh(tensor: Tensor) -> float:
        return part if tensor.dim() > 1 and tensor.shape[-1] == hidden else 1.0

    return weigh
