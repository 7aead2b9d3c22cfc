"""A few layers that stand for all of a model: those that hold and train alike are of one kind, and one is enough.

What one layer more adds is multiplied by their number, so that a model of a hundred layers takes as long as one of
two.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from graftwork.errors import GraftworkError
from graftwork.models.base import Model
from graftwork.planning.blueprint import Blueprint
from graftwork.planning.parameters import Held
from graftwork.planning.trace import Trace, Weigh, trace
from graftwork.planning.workload import Workload

BASE = 1
"""Layers of each part that every run of a sample has."""


@dataclass(frozen=True)
class Kind:
    """Layers (global indices) of a part that hold tensors of the same names and shapes and train the same ones."""

    part: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """A drafted model, and where in it a layer of each kind stands."""

    model: Model
    standing: Mapping[Kind, int]

    def base(self, kind: Kind) -> int:
        """Return how many layers of this kind every run has."""
        return BASE if self._base()[kind.part] == [self.standing[kind]] * BASE else 0

    def run(
        self,
        workload: Workload,
        targets: int,
        more: Kind | None = None,
        context: int = 1,
        weigh: Weigh = lambda _: 1.0,
    ) -> Trace:
        """Run a microbatch through the base layers, and one layer ``more`` of a kind."""
        layers = self._base()
        if more is not None:
            layers[more.part].append(self.standing[more])
        with _only(self.model, layers):
            return trace(self.model, workload.microbatch(self.model, context), targets, weigh)

    def _base(self) -> dict[str, list[int]]:
        return {kind.part: [index] * BASE for kind, index in reversed(list(self.standing.items()))}


def kinds_of(parameters: Sequence[Held]) -> list[Kind]:
    """Sort the layers of a model into kinds."""
    content: dict[tuple[str, int], set[object]] = {}
    for one in parameters:
        if one.layer is not None:
            content.setdefault((one.part, one.layer), set()).add((one.inside, one.shape, one.trains))
    alike: dict[tuple[str, frozenset[object]], list[int]] = {}
    for (part, layer), inside in content.items():
        alike.setdefault((part, frozenset(inside)), []).append(layer)
    return [Kind(part, tuple(layers)) for (part, _), layers in alike.items()]


def sample(blueprint: Blueprint, kinds: Sequence[Kind]) -> Sample:
    """Draft a model with a layer of each kind, with as few layers as will do; inside of ``world_of_one``."""
    if len({kind.part for kind in kinds}) == len(kinds):
        try:
            return Sample(blueprint.shallow().draft(), dict.fromkeys(kinds, 0))
        except GraftworkError:
            pass  # a transform names layers by their index
    return Sample(blueprint.draft(), {kind: kind.layers[0] for kind in kinds})


@contextmanager
def _only(model: Model, layers: Mapping[str, list[int]]) -> Iterator[None]:
    """Let each part of the model have these of its layers inside the block; one may stand there several times."""
    stacks = {part: model.chunks[0].get_submodule(part) for part in layers}
    whole = {part: list(stack.get_submodule("layers").children()) for part, stack in stacks.items()}
    try:
        for part, stack in stacks.items():
            _give(stack, [stack.get_submodule(f"layers.{index}") for index in layers[part]])
        yield
    finally:
        for part, stack in stacks.items():
            _give(stack, whole[part])


def _give(stack: nn.Module, layers: Sequence[nn.Module]) -> None:
    stack.layers = nn.ModuleList(layers)
    vars(stack)["num_layers_per_pipeline_rank"] = len(layers)  # what recomputation goes by
