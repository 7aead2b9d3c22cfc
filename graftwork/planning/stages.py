"""Pipeline stages: which layers and tensors stand on each, and how many microbatches wait on it at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graftwork.layout import Layout
from graftwork.planning.parameters import Held

_OUTPUT = "output_layer"
_TABLE = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Stage:
    """One of the pipeline's ranks: its ``layers`` (part, index) and ``parameters``.

    ``waiting``: microbatches whose activations it holds at once, as a share of all its layers (virtual stages hold
    some of theirs for more microbatches).
    """

    index: int
    layers: tuple[tuple[str, int], ...]
    parameters: tuple[Held, ...]
    waiting: float
    first: bool
    last: bool


def stages(parameters: Sequence[Held], layout: Layout, microbatches: int) -> list[Stage]:
    """Divide a model over the pipeline; an encoder-decoder is never divided."""
    size, virtual = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    depth = max((one.layer for one in parameters if one.layer is not None), default=-1) + 1
    chunk = max(1, depth // (size * virtual))

    def of(index: int) -> Iterator[Held]:
        last = index == size - 1
        for one in parameters:
            if one.layer is not None:
                there = size == 1 or (one.layer // chunk) % size == index
            else:
                tied_copy = last and size > 1 and one.inside == _TABLE and not _untied(parameters)
                there = (index == 0 if one.first else last) or tied_copy
            if there:
                yield one

    found = []
    for index in range(size):
        mine = tuple(of(index))
        layers = dict.fromkeys((one.part, one.layer) for one in mine if one.layer is not None)
        waiting = _waiting(index, size, virtual, microbatches)
        found.append(Stage(index, tuple(layers), mine, waiting, index == 0, index == size - 1))
    return found


def _untied(parameters: Sequence[Held]) -> bool:
    return any(one.inside.startswith(_OUTPUT) and one.owner is None for one in parameters)


def _waiting(index: int, size: int, virtual: int, microbatches: int) -> float:
    """One forward, one backward: a stage runs ahead of the last one by as many microbatches as lie between them."""
    if virtual == 1:
        return min(size - index, microbatches)
    ahead = 2 * (size - index - 1) + (virtual - 1) * size + 1
    return min(ahead, microbatches * virtual) / virtual
