"""Hugging Face checkpoint -> megatron-core module, tensor by tensor; each rank reads only its own slices."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from graftwork import parallel
from graftwork.errors import CheckpointError
from graftwork.models.shape import Shape
from graftwork.models.weights.files import TensorFiles
from graftwork.models.weights.hf import mapping_for
from graftwork.models.weights.mapping import Mapping, Rule
from graftwork.parallel.names import global_name

Modules = Module | Sequence[Module]
"""One pipeline stage, or the list of its virtual stages."""


def load_weights(module: Modules, shape: Shape, directory: str | Path) -> None:
    """Fill the base parameters of ``module`` (one stage, or its list of virtual stages) from ``directory``.

    Adapters may already be attached. Parameters keep their dtype. Raises CheckpointError, naming the tensors, for
    missing, unexpected or wrongly shaped ones, before any parameter is changed.
    """
    mapping = mapping_for(shape)
    with open_checkpoint(mapping, directory) as files, torch.no_grad():
        for name, parameter in base_parameters(module):
            rule = mapping.rule(name)
            local = read(rule, files, parallel.tp_rank(), parallel.tp_size())
            if local.shape != parameter.shape:
                shapes = f"{tuple(parameter.shape)}, the checkpoint fills {tuple(local.shape)}"
                raise CheckpointError(f"the model's {name} has shape {shapes}.")
            parameter.copy_(local)


def read(rule: Rule, files: TensorFiles, rank: int, size: int) -> Tensor:
    """Return the part of one core parameter that tensor-parallel ``rank`` of ``size`` holds."""
    return rule.op.read([files.source(name) for name in rule.hf], rank, size)


def base_parameters(module: Modules) -> Iterator[tuple[str, Parameter]]:
    """Yield (name with the global layer index, parameter) of every base parameter of this rank's stage(s)."""
    for stage in [module] if isinstance(module, Module) else module:
        for name, parameter in stage.named_parameters():
            if ".adapters." not in name:
                yield global_name(stage, name), parameter


def open_checkpoint(mapping: Mapping, directory: str | Path) -> TensorFiles:
    """Open ``directory`` and check that it holds exactly the tensors of ``mapping``, with their shapes.

    Raises CheckpointError naming the tensors that are missing, unexpected or wrongly shaped.
    """
    files = TensorFiles(directory, mapping.canonical)
    expected = mapping.hf_shapes()
    problems = [
        _listed("missing", expected.keys() - files.files.keys()),
        _listed("unexpected", files.files.keys() - expected.keys()),
        _listed("of the wrong shape", _wrong_shapes(expected, files)),
    ]
    found = "; ".join(p for p in problems if p)
    if found:
        files.close()
        raise CheckpointError(f"{str(directory)!r} does not fit this {mapping.family} model: {found}.")
    return files


def _wrong_shapes(expected: dict[str, tuple[int, ...]], files: TensorFiles) -> Iterator[str]:
    for name in expected.keys() & files.files.keys():
        actual = tuple(files.source(name).get_shape())
        if actual != expected[name]:
            yield f"{name} is {list(actual)} instead of {list(expected[name])}"


def _listed(what: str, names: Iterable[str], limit: int = 5) -> str:
    ordered = sorted(names)
    if not ordered:
        return ""
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"{len(ordered)} tensor(s) {what}: {', '.join(ordered[:limit])}{more}"
