"""The low-rank updates of LoRA, CanonicalLoRA and DoRA, each with its factors as they multiply a weight."""

from dataclasses import dataclass

from torch import Tensor

from graftwork.models.exchange.lazy import Held, Lazy
from graftwork.models.exchange.low_rank import A, B, scale_of
from graftwork.models.exchange.places import Linear
from graftwork.peft.methods import CanonicalLoRA, LoRA
from graftwork.peft.methods.dora import EMBEDDING


@dataclass(frozen=True)
class Update:
    """``scale * B A`` on a linear, or the rows of its ``part``: A ``low`` [rank, inputs], B ``high`` [outputs, rank].

    ``name`` chooses its rank and alpha; ``stem`` stands in front of the names of its tensors. Of an embedding A is
    [rank, vocabulary], stored the other way round (``turned``).
    """

    name: str
    stem: str
    scale: float
    low: Lazy
    high: Lazy
    part: int | None = None
    turned: bool = False

    @property
    def rank(self) -> int:
        """Its rank."""
        return self.low.shape[0]

    def change(self) -> Tensor:
        """Return what is added to the weight, [outputs, inputs]."""
        return self.scale * (self.high[:] @ self.low[:])


def updates_at(transform: LoRA, linear: Linear, held: Held) -> list[Update]:
    """Return the updates of a transform at a linear or embedding; raises ArtifactError for misshapen factors."""
    if linear.leaf == EMBEDDING:
        return [_embedding(transform, linear, held)]
    if not (isinstance(transform, CanonicalLoRA) and linear.parts):
        name = linear.updates[0] if isinstance(transform, CanonicalLoRA) else linear.name
        return [_update(transform, name, f"{linear.name}.", linear.inputs, sum(linear.widths), held)]
    return [
        _update(transform, name, f"{linear.name}.{part}_", linear.inputs, count, held, index)
        for index, (part, name, count) in enumerate(zip(linear.parts, linear.updates, linear.counts))
        if f"{linear.name}.{part}_{A}" in held.names
    ]


def _update(
    transform: LoRA, name: str, stem: str, inputs: int, outputs: int, held: Held, part: int | None = None
) -> Update:
    rank, alpha = transform.rank_and_alpha(name)
    low, high = held.take(f"{stem}{A}", rank, inputs), held.take(f"{stem}{B}", outputs, rank)
    return Update(name, stem, scale_of(rank, alpha, transform.use_rslora), low, high, part)


def _embedding(transform: LoRA, linear: Linear, held: Held) -> Update:
    rank, alpha = transform.rank_and_alpha(linear.name)
    ((vocabulary, hidden),) = linear.rows.shapes
    looked_up, high = held.take(f"{linear.name}.{A}", vocabulary, rank), held.take(f"{linear.name}.{B}", hidden, rank)
    low = Lazy((rank, vocabulary), lambda: looked_up[:].T)
    scale = scale_of(rank, alpha, transform.use_rslora)
    return Update(linear.name, f"{linear.name}.", scale, low, high, turned=True)
