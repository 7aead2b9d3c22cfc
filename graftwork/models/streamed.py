"""A checkpoint that runs without being in memory: each layer's weights are read when it runs and dropped behind it."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from graftwork import parallel
from graftwork.core.records import EMBEDDING
from graftwork.errors import ParallelismError
from graftwork.models.base import Model
from graftwork.models.load import MODELS
from graftwork.models.weights import family_named, fingerprint, mapping_for, read_config, shape_from_hf
from graftwork.models.weights.files import TensorFiles
from graftwork.models.weights.hub import at_hand
from graftwork.models.weights.load import base_parameters, open_checkpoint, read
from graftwork.models.weights.mapping import Mapping
from graftwork.parallel.collective import world_size

Change = Callable[[str, Tensor], Tensor]
"""What a tensor of ours, by its name, is taken for when it is read, in the dtype of the file."""
OUTPUT = "output_layer.weight"
_LAYER = re.compile(r"((?:en|de)coder\.layers\.\d+)\.")
_LARGE = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


def as_stored(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor as it was read."""
    return tensor


@contextmanager
def streamed(directory: str | Path, keep: Collection[str] = (), change: Change = as_stored) -> Iterator[Model]:
    """Yield the model of a checkpoint, in fp32 and for inference, with the memory of a layer or of its embedding.

    ``keep``: parameters that stay where they are, because adapters train them. The process is a parallel world of its
    own inside of the block. Raises ParallelismError in one that belongs to a larger world, CheckpointError for a
    checkpoint that cannot be read.
    """
    shape = shape_from_hf(read_config(directory))
    mapping = mapping_for(shape, tensor_parallel=1)
    with _world_of_one(), open_checkpoint(mapping, directory) as files:
        model = MODELS[family_named(shape.family).kind](shape, checkpoint=str(directory), dtype="fp32")
        with _without_memory():
            (chunk,) = model.build()
        feed = _Feed(chunk, mapping, files, change)
        feed.connect(chunk, keep)
        model.module = chunk
        try:
            yield model.eval()
        finally:
            feed.end()


def trained_on(printed: str | None, *names: str | None) -> Path | None:
    """Return the checkpoint with this fingerprint that one of the names means here; None where there is none."""
    places = [place for name in names if name and (place := at_hand(name)) is not None]
    return next((place for place in places if printed is not None and fingerprint(place, printed) == printed), None)


class _Feed:
    """Gives the parameters of a chunk their values, and takes them away again; one without has one zero for all."""

    def __init__(self, chunk: nn.Module, mapping: Mapping, files: TensorFiles, change: Change) -> None:
        self._mapping, self._files, self._change = mapping, files, change
        self._places = {name: _place(chunk, name) for name, _ in base_parameters(chunk)}

    def connect(self, chunk: nn.Module, keep: Collection[str]) -> None:
        """Let every layer, the embedding and the output layer be read when they run; read what is left now."""
        groups: dict[str, list[str]] = {}
        moving = [name for name in self._places if name not in keep]
        for name in moving:
            if found := _LAYER.match(name):
                groups.setdefault(found.group(1), []).append(name)
        for path, names in groups.items():
            layer = chunk.get_submodule(path)
            layer.register_forward_pre_hook(partial(self._begun, names, ()))
            layer.register_forward_hook(partial(self._ended, names))
        first = [name for name in (EMBEDDING,) if name in moving]
        last = [name for name in (OUTPUT if OUTPUT in self._places else EMBEDDING,) if name in moving]
        chunk.get_submodule("embedding").register_forward_pre_hook(partial(self._begun, first, last))
        chunk.get_submodule("embedding").register_forward_hook(partial(self._ended, first))
        chunk.get_submodule("decoder").register_forward_hook(lambda *_: self._take(last))
        streamed = {*first, *last, *(name for names in groups.values() for name in names)}
        self._drop(streamed)
        self._take([name for name in self._places if name not in streamed])

    def end(self) -> None:
        """Let everything go that was read; hooks and modules know each other, and so outlive the model for a while."""
        self._drop(self._places)

    def _begun(self, names: Sequence[str], over: Sequence[str], *_: object) -> None:
        self._drop(over)
        self._take(names)

    def _ended(self, names: Sequence[str], *_: object) -> None:
        self._drop(names)

    def _take(self, names: Collection[str]) -> None:
        for name in names:
            value = self._change(name, read(self._mapping.rule(name), self._files, 0, 1))
            self._put(name, value.to(self._old(name).device, torch.float32))

    def _drop(self, names: Collection[str]) -> None:
        for name in names:
            self._put(name, _hollow(self._old(name)))

    def _put(self, name: str, value: Tensor) -> None:
        module, leaf = self._places[name]
        module._parameters[leaf] = _like(self._old(name), value)

    def _old(self, name: str) -> nn.Parameter:
        module, leaf = self._places[name]
        found = module._parameters[leaf]
        assert found is not None, "it was listed"
        return found


@contextmanager
def _world_of_one() -> Iterator[None]:
    """Make this process a parallel world of its own inside the block, and leave no trace of it."""
    if world_size() > 1:
        raise ParallelismError("a checkpoint is streamed in one process, not in one of several ranks.")
    mine = not parallel.is_initialized()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            if mine and parallel.is_initialized():
                parallel.destroy()


@contextmanager
def _without_memory() -> Iterator[None]:
    """Let the weights of linears and embeddings that are made inside the block have no memory of their own."""

    def hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        large = isinstance(module, _LARGE) and parameter is not None and parameter.ndim > 1
        return _like(parameter, _hollow(parameter)) if large and parameter is not None else parameter

    # annotated as if it returned nothing; what it returns takes the parameter's place
    handle = register_module_parameter_registration_hook(hollow)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _hollow(parameter: Tensor) -> Tensor:
    return torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Return a frozen parameter with all that is noted on another one."""
    other = nn.Parameter(value, requires_grad=False)
    other.__dict__.update(parameter.__dict__)
    return other


def _place(chunk: nn.Module, name: str) -> tuple[nn.Module, str]:
    head, _, leaf = name.rpartition(".")
    return chunk.get_submodule(head), leaf
