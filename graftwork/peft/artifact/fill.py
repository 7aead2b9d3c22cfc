"""Filling attached adapters with the values of an artifact: all tensors checked before any is copied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftwork.errors import ArtifactError, GraftworkError
from graftwork.parallel.collective import agree
from graftwork.peft.adapter import Adapter, sharding_of
from graftwork.peft.artifact.directory import TENSORS
from graftwork.peft.stack import Stack


@dataclass(frozen=True)
class Slot:
    """Where one tensor of an artifact goes on this rank."""

    adapter: Adapter
    parameter: Tensor


def fill(stack: Stack, path: str | Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Copy the tensors of adapters ``names`` into the model; each rank reads only its slices.

    ``config`` is the artifact's. Raises ArtifactError on unknown, missing or misshapen tensors and on NaN or Inf, on
    every rank and before any parameter is changed.
    """
    error: GraftworkError | None = None
    values: list[tuple[Tensor, Tensor]] = []
    try:
        values = _read(stack, Path(path), config, names)
    except GraftworkError as refused:
        error = refused
    agree(error)
    for parameter, value in values:
        parameter.detach().copy_(value)


def _read(stack: Stack, path: Path, config: Mapping[str, Any], names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    slots, derived = _slots(stack, names)
    expected = set(stack.host.everywhere([*slots, *derived]))
    others = {a["hyperparameters"]["name"] for a in config["adapters"]} - set(names)
    try:
        with safe_open(path / TENSORS, "pt") as file:
            held = {key for key in file.keys() if key.partition(".")[0] not in others}  # noqa: SIM118
            _check_names(held, expected, path)
            return [(slot.parameter, _value(file.get_slice(key), slot, key, path)) for key, slot in slots.items()]
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{TENSORS} in {str(path)!r} cannot be read ({error}); it is truncated.") from error


def _slots(stack: Stack, names: Sequence[str]) -> tuple[dict[str, Slot], list[str]]:
    """Return where this rank's tensors go, and the names of the derived ones, which nothing reads."""
    slots: dict[str, Slot] = {}
    derived: list[str] = []
    for name in names:
        for item in stack.grafted[name]:
            if item.adapter.merged:
                raise ArtifactError(f"Adapter {name!r} is merged into the base; unmerge it before loading its values.")
            root = f"{name}.{item.site.name}"
            slots |= {f"{root}.{key}": Slot(item.adapter, p) for key, p in item.adapter.named_parameters()}
            derived += [f"{root}.{key}" for key in item.adapter.extra_tensors()]
    return slots, derived


def _check_names(held: set[str], expected: set[str], path: Path) -> None:
    unknown, missing = sorted(held - expected), sorted(expected - held)
    if unknown:
        raise ArtifactError(f"{str(path)!r} holds {len(unknown)} tensors its stack does not have, e.g. {unknown[0]!r}.")
    if missing:
        raise ArtifactError(f"{str(path)!r} lacks {len(missing)} tensors of its stack, e.g. {missing[0]!r}.")


def _value(source: Any, slot: Slot, key: str, path: Path) -> Tensor:
    sharding = sharding_of(slot.parameter)
    if tuple(source.get_shape()) != sharding.shape:
        raise ArtifactError(
            f"Tensor {key!r} in {str(path)!r} has shape {source.get_shape()}, but the model needs "
            f"{list(sharding.shape)}."
        )
    value = sharding.read(source, *slot.adapter.tp)
    if not torch.isfinite(value).all():
        raise ArtifactError(f"Tensor {key!r} in {str(path)!r} holds NaN or Inf.")
    return value
