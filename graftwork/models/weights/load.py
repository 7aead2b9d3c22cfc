"""Hugging Face checkpoint -> megatron-core module, tensor by tensor; each rank reads only its own slices."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from graftwork import parallel
from graftwork.errors import CheckpointError, quoted
from graftwork.models.shape import Shape
from graftwork.models.weights.files import TensorFiles
from graftwork.models.weights.hf import mapping_for, read_config, shape_from_hf
from graftwork.models.weights.mapping import Mapping, Rule, Stack
from graftwork.models.weights.views import PartOfStack, Stored
from graftwork.parallel.names import global_name

Modules = Module | Sequence[Module]
"""One pipeline stage, or the list of its virtual stages."""
FORMATS = ("F32", "BF16", "F16", "F64")
"""Number formats that are read, as safetensors names them."""
MANY = 10_000
"""More tensors than this, and than twice those that are there, are not listed: a config may claim any number."""
ROWS = 4096


def load_weights(module: Modules, shape: Shape, directory: str | Path) -> None:
    """Fill the base parameters of ``module`` (one stage, or its list of virtual stages) from ``directory``.

    Adapters may already be attached. Parameters keep their dtype. Raises CheckpointError, naming the tensors, for
    missing, unexpected or wrongly shaped ones, before any parameter is changed, and for values that are not finite.
    """
    mapping = mapping_for(shape)
    with open_checkpoint(mapping, directory) as files, torch.no_grad():
        for name, parameter in base_parameters(module):
            rule = mapping.rule(name)
            local = read(rule, files, parallel.tp_rank(), parallel.tp_size()).to(parameter.dtype)
            if local.shape != parameter.shape:
                shapes = f"{tuple(parameter.shape)}, the checkpoint fills {tuple(local.shape)}"
                raise CheckpointError(f"the model's {name} has shape {shapes}.")
            if not _finite(local):
                raise CheckpointError(_not_finite(rule, files, parameter.dtype))
            parameter.copy_(local)


def check_checkpoint(shape: Shape, directory: str | Path) -> None:
    """Refuse a checkpoint that is not one of ``shape``; reads config.json and headers only, nothing is allocated.

    Raises CheckpointError naming the fields or tensors that differ.
    """
    check_shape(shape, shape_from_hf(read_config(directory)), directory)
    open_checkpoint(mapping_for(shape, tensor_parallel=1), directory).close()


def check_shape(shape: Shape, theirs: Shape, where: str | Path) -> None:
    """Raise CheckpointError, naming the fields that differ, unless ``shape`` is that of the checkpoint ``where``."""
    # Dropout is a training choice, not part of the weights.
    names = [f.name for f in fields(theirs) if not f.name.endswith("_dropout")]
    ours = {name: getattr(shape, name, None) for name in names}
    differing = [name for name in names if ours[name] != getattr(theirs, name)]
    if differing:
        shown = ", ".join(f"{n}={ours[n]!r} (there {getattr(theirs, n)!r})" for n in differing[:5])
        raise CheckpointError(
            f"the model's shape is not that of the checkpoint {quoted(where)}: {shown}; set these fields of "
            "model.shape to the checkpoint's values, or choose another checkpoint."
        )


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
    try:
        for stack in mapping.stacks:
            _unstack(mapping, stack, files)
        _check_twins(mapping, files)
        _check_tensors(mapping, files)
    except CheckpointError:
        files.close()
        raise
    return files


def _unstack(mapping: Mapping, stack: Stack, files: TensorFiles) -> None:
    """Know the parts of every ``stack`` in ``files`` by the names of experts' tensors; one of another shape stays."""
    heights = [height for height, _ in stack.rule.op.shapes]
    whole = [mapping.experts, sum(heights), stack.rule.op.shapes[0][1]]
    pattern = re.compile(re.escape(stack.hf).replace(re.escape("{layer}"), r"(\d{1,9})"))
    for name in list(files.files):
        found = pattern.fullmatch(name)
        if found is None or list(files.source(name).get_shape()) != whole:
            continue
        parts = {}
        for expert in range(mapping.experts):
            names = stack.rule.at(int(found.group(1)), expert).hf
            ends = list(accumulate(heights))
            for part, end, height in zip(names, ends, heights):
                parts[part] = PartOfStack(expert, end - height, end)
        files.unstack(name, parts)


def _check_tensors(mapping: Mapping, files: TensorFiles) -> None:
    count, held = mapping.count(), len(files.files)
    # A configuration may claim billions of layers: their names are not even listed.
    many = count > MANY + 2 * held
    expected = {} if many else mapping.hf_shapes()
    problems = [
        f"it describes {count} tensors and the files hold {held}" if many else "",
        _listed("missing", expected.keys() - files.files.keys()),
        _listed("unexpected", [] if many else files.files.keys() - expected.keys()),
        _listed("of the wrong shape", _wrong_shapes(expected, files)),
        _listed(f"in a format that is not supported (valid: {', '.join(FORMATS)})", _wrong_formats(files)),
    ]
    found = "; ".join(p for p in problems if p)
    if found:
        raise CheckpointError(f"{quoted(files.directory)} does not fit this {mapping.family} model: {found}.")


def _check_twins(mapping: Mapping, files: TensorFiles) -> None:
    """Leave out a second copy of tied weights; raises CheckpointError when it is not the same, bit for bit."""
    for twin, name in mapping.twins.items():
        if twin not in files.files or name not in files.files:
            continue
        if not _same(files.source(twin), files.source(name)):
            raise CheckpointError(
                f"{quoted(files.directory)} ties {twin} to {name} in its config.json, but holds different values for "
                "the two; if the head is its own, tie_word_embeddings must be false."
            )
        files.forget(twin)


def _same(one: Stored, other: Stored) -> bool:
    if (one.get_shape(), one.get_dtype()) != (other.get_shape(), other.get_dtype()):
        return False
    rows = one.get_shape()[0] if one.get_shape() else 0
    parts = [slice(start, start + ROWS) for start in range(0, rows, ROWS)]
    return all(torch.equal(_bytes(one[part]), _bytes(other[part])) for part in parts)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _finite(tensor: Tensor) -> bool:
    # One pass without a mask: the smallest and the largest value are NaN where any value is.
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _not_finite(rule: Rule, files: TensorFiles, dtype: torch.dtype) -> str:
    bad = [name for name in rule.hf if not _finite(files.source(name)[:].to(dtype))]
    named = ", ".join(files.stored_name(name) for name in bad or rule.hf)
    return f"the base's weights in {quoted(files.directory)} are NaN or infinite in {named}; get the checkpoint anew."


def _wrong_shapes(expected: dict[str, tuple[int, ...]], files: TensorFiles) -> Iterator[str]:
    for name in expected.keys() & files.files.keys():
        actual = tuple(files.source(name).get_shape())
        if actual != expected[name]:
            yield f"{name} is {list(actual)} instead of {list(expected[name])}"


def _wrong_formats(files: TensorFiles) -> Iterator[str]:
    for name in files.files:
        actual = files.source(name).get_dtype()
        if actual not in FORMATS:
            yield f"{name} is {quoted(actual, bare=True)}"


def _listed(what: str, names: Iterable[str], limit: int = 3) -> str:
    ordered = sorted(names)
    if not ordered:
        return ""
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"{len(ordered)} tensor(s) {what}: {', '.join(quoted(n, bare=True) for n in ordered[:limit])}{more}"
