"""What every parameter takes on a rank, from its record: where it stands, how much of it, whether it trains."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from graftwork.layout import Layout
from graftwork.models.base import Model
from graftwork.parallel.record import record_of

_LAYER = re.compile(r"(\w+)\.layers\.(\d+)\.(.*)")
_FIRST = ("embedding", "relative_pos_emb")


@dataclass(frozen=True)
class Held:
    """One parameter: ``part`` and ``layer`` (None outside of the layers), its place ``inside``, full ``shape``.

    ``cut``: each tensor-parallel rank holds a part; ``expert``: ranks share the experts; ``width``: bytes an element;
    ``owner``: the adapter that it belongs to, None for the base; ``first``: outside of layers, it stands before them.
    """

    part: str
    layer: int | None
    inside: str
    shape: tuple[int, ...]
    cut: int | None
    expert: bool
    width: int
    owner: str | None
    trains: bool
    first: bool

    def elements(self, layout: Layout) -> float:
        """Return how many of its elements a rank of its pipeline stage holds; of experts a mean."""
        size, tensor = math.prod(self.shape), layout.tensor_model_parallel_size
        if self.expert:
            return size / layout.expert_model_parallel_size
        if self.cut is None:
            return size
        return size // self.shape[self.cut] * math.ceil(self.shape[self.cut] / tensor)


def held(model: Model) -> list[Held]:
    """Return every parameter of a model drafted in a world of one."""
    return [one for chunk in model.chunks for one in _of(chunk)]


def _of(chunk: nn.Module) -> Iterator[Held]:
    for name, parameter in chunk.named_parameters():
        record, found = record_of(parameter), _LAYER.search(name)
        part, layer, inside = found.groups() if found else ("", None, name)
        yield Held(
            part=part,
            layer=None if layer is None else int(layer),
            inside=inside,
            shape=tuple(record.sharding.shape),
            cut=record.sharding.dim if record.cut else None,
            expert=record.expert,
            width=parameter.element_size(),
            owner=record.owner,
            trains=parameter.requires_grad,
            first=any(word in name for word in _FIRST),
        )
