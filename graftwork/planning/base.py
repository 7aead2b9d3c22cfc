"""The base checkpoint of a run, looked at before it starts: headers only; nothing is loaded, made or downloaded."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from graftwork.errors import CheckpointError, ConfigError
from graftwork.models.precision import resolve_dtype
from graftwork.models.shapes import Shape
from graftwork.models.weights import check_checkpoint, family_of, read_config
from graftwork.models.weights.files import TensorFiles
from graftwork.models.weights.gguf import shape_of
from graftwork.models.weights.hub import Conversion, HubModel, find
from graftwork.models.weights.load import check_shape
from graftwork.planning.problem import Problem

NARROW = 2
"""Bytes of a number in a converted GGUF file, and in most checkpoints of the hub: bf16."""

FIELD = "model.checkpoint"


@dataclass(frozen=True)
class BaseFindings:
    """What the base of a run is.

    ``name``: as the recipe says, None for random weights; ``directory``: its checkpoint, None while this machine has
    none; ``family``: its model_type; ``size_bytes``: of its weights on the disk; ``formats``: (number format as
    safetensors names it, tensors in it); ``notes``: sentences on what a run would do first.
    """

    name: str | None
    directory: str | None = None
    family: str | None = None
    size_bytes: int = 0
    formats: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()


def look_at_base(checkpoint: str | None, shape: Shape, dtype: str | None = None) -> tuple[BaseFindings, list[Problem]]:
    """Return what ``checkpoint`` is, and what would stop a model of ``shape`` in ``dtype`` that starts from it."""
    try:
        source = None if checkpoint is None else find(checkpoint)
        if source is None:
            found = BaseFindings(None, family=shape.family, notes=("no checkpoint is named: the base is random.",))
        elif isinstance(source, Path):
            found = _present(str(checkpoint), source, shape)
        elif isinstance(source, Conversion):
            found = _to_convert(str(checkpoint), source, shape)
        else:
            found = _to_download(source, shape)
        problems = []
    except CheckpointError as error:
        source, found, problems = None, BaseFindings(checkpoint), [Problem(FIELD, str(error))]
    try:
        resolve_dtype(dtype, source if isinstance(source, Path) else None)
    except (CheckpointError, ConfigError) as error:
        problems.append(Problem("model.dtype", str(error)))
    return found, problems


def _present(name: str, directory: Path, shape: Shape) -> BaseFindings:
    """Read the headers of a checkpoint; raises CheckpointError for one that is damaged or of another shape."""
    family = family_of(read_config(directory)).name
    check_checkpoint(shape, directory)
    with TensorFiles(directory) as files:
        formats = Counter(files.source(tensor).get_dtype() for tensor in files.files)
        size = sum(file.stat().st_size for file in set(files.files.values()))
    return BaseFindings(name, str(directory), family, size, tuple(formats.most_common()))


def _to_convert(name: str, source: Conversion, shape: Shape) -> BaseFindings:
    """Read the header of a GGUF file; raises CheckpointError where it cannot become a checkpoint of ``shape``."""
    file = source.locate()
    check_shape(shape, shape_of(file), file)
    needed = shape.total_parameters() * NARROW
    _check_room(source.target, needed, "its conversion", "set GRAFTWORK_CACHE to a directory on another disk")
    note = f"the first run converts {file.name} into {source.target} ({needed / 1e9:.2f} GB)."
    return BaseFindings(name, None, shape.family, file.stat().st_size, notes=(note,))


def _to_download(source: HubModel, shape: Shape) -> BaseFindings:
    from huggingface_hub.constants import HF_HUB_CACHE

    needed = shape.total_parameters() * NARROW
    _check_room(Path(HF_HUB_CACHE), needed, f"{source.name} in bf16", "set HF_HOME to a directory on another disk")
    note = (
        f"{source.name} is not on this machine: the first run downloads it from the hub (about {needed / 1e9:.2f} GB "
        f"in bf16); where the job has no network, run before: hf download {source.name}"
    )
    return BaseFindings(source.name, None, shape.family, notes=(note,))


def _check_room(place: Path, needed: int, what: str, mend: str) -> None:
    disk = next(one for one in (place.absolute(), *place.absolute().parents) if one.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise CheckpointError(
            f"the disk of {str(disk)!r} has {free / 1e9:.3g} GB free, but {what} needs {needed / 1e9:.3g} GB: {mend}."
        )
