"""Adapters made anew from the files of an artifact, in the place of the live ones: nothing live is written to."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from graftwork.errors import ArtifactError, quoted
from graftwork.parallel.collective import agree, agreed, broadcast_object
from graftwork.parallel.record import mark, record_of
from graftwork.peft.artifact.config import ArtifactConfig
from graftwork.peft.artifact.entries import transforms
from graftwork.peft.artifact.verified import StoredTensor, VerifiedFile, stored_tensors
from graftwork.peft.method import PEFT
from graftwork.peft.stack import Grafted, Stack
from graftwork.peft.wrapper import parameter_device

PIECE = 64 * 2**20
"""Bytes of tensors that travel from the first rank to the others at once."""


@contextmanager
def rebuilt(
    stack: Stack,
    names: Sequence[str],
    config: ArtifactConfig,
    file: VerifiedFile | None,
    gathered: Mapping[str, Tensor],
) -> Iterator[None]:
    """Let what the files of an artifact hold act in the place of the named adapters inside the block; collective.

    ``file`` and ``gathered``, what was to be written to it, are the first rank's. Raises ArtifactError, on every rank,
    when methods or options read differ from the live ones, or a tensor differs from the live one in any bit.
    """
    twins = agreed(lambda: _twins(stack, names, config))
    problem: str | None = None
    seen: set[str] = set()
    for tensors in _pieces(file, gathered):
        problem = problem or _compared(stack, names, tensors)
        for name, items in twins.items():
            fill(stack, name, items, tensors)
        seen |= tensors.keys()
    empty = {f"{name}.{key}" for name, items in twins.items() for item in items for key in unfilled(item)}
    missing = sorted(({tensor.key for name in names for tensor in stack.tensors(name)} - seen) | empty)
    problem = problem or (f"tensor {missing[0]!r} is missing" if missing else None)
    agree(None if problem is None else ArtifactError(problem))
    with stack.standing_in(twins):
        yield


def _twins(stack: Stack, names: Sequence[str], config: ArtifactConfig) -> dict[str, list[Grafted]]:
    """Return the adapters that the configuration describes, built at the sites of the live ones, without values."""
    found = {transform.name: transform for transform in transforms(config, "what was written")}
    if list(found) != list(names):
        raise ArtifactError(f"the configuration names adapters {quoted(list(found), bare=True)}, not {list(names)}")
    for name, transform in found.items():
        live = stack.transforms[name]
        if type(transform) is not type(live) or _plain(transform) != _plain(live):
            raise ArtifactError(f"the configuration describes {name!r} as {quoted(repr(transform), bare=True)}")
    return {name: stack.twins(transform) for name, transform in found.items()}


def _plain(transform: PEFT) -> str:
    return json.dumps(transform.hyperparameters(), sort_keys=True)  # a tuple is a list on the disk


def _pieces(file: VerifiedFile | None, gathered: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of the file on every rank, whole, some at a time; the first rank compares what it reads."""
    stored: dict[str, StoredTensor] = agreed(lambda: {} if file is None else _stored(file, gathered))
    for group in broadcast_object(groups(gathered)):
        read = partial(_read, stored, gathered, group)
        yield broadcast_object(agreed(read, catch=(OSError,), explain=lambda error: ArtifactError(str(error))))


def _read(
    stored: Mapping[str, StoredTensor], gathered: Mapping[str, Tensor], group: Sequence[str]
) -> dict[str, Tensor]:
    found = {key: stored[key][:] for key in group if key in stored}
    for key, tensor in found.items():
        if not torch.equal(tensor, gathered[key]):
            raise ArtifactError(f"tensor {key!r} has other values in the file")
    return found


def _stored(file: VerifiedFile, gathered: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    stored = stored_tensors(file)
    strange = sorted(stored.keys() ^ gathered.keys())
    if strange:
        raise ArtifactError(f"tensor {quoted(strange[0])} is {'missing' if strange[0] in gathered else 'not known'}")
    for key, tensor in stored.items():
        if tensor.shape != tuple(gathered[key].shape):
            raise ArtifactError(f"tensor {key!r} has shape {list(tensor.shape)}, not {list(gathered[key].shape)}")
    return stored


def groups(gathered: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of tensors in groups of about ``PIECE`` bytes."""
    found: list[list[str]] = []
    size = 0
    for key, tensor in gathered.items():
        if size + tensor.nbytes > PIECE or not found:
            found.append([])
            size = 0
        found[-1].append(key)
        size += tensor.nbytes
    return found


def _compared(stack: Stack, names: Sequence[str], tensors: Mapping[str, Tensor]) -> str | None:
    """Return what differs between this rank's live tensors and those read, where both are there."""
    for live in (tensor for name in names for tensor in stack.tensors(name) if tensor.key in tensors):
        record, full = record_of(live.parameter), tensors[live.key]
        if tuple(full.shape) != record.sharding.shape:
            return f"tensor {live.key!r} has shape {list(full.shape)}, not {list(record.sharding.shape)}"
        read, value = record.sharding.take(full, *record.place), live.value.float().cpu()
        if record.sharding.padded is not None:  # no file holds padding
            value = value * record.sharding.take(torch.ones_like(full), *record.place)
        if not torch.equal(read, value):
            return f"tensor {live.key!r} differs from the trained one"
    return None


def fill(stack: Stack, name: str, items: Sequence[Grafted], tensors: Mapping[str, Tensor]) -> None:
    """Give those adapters without values that ``tensors`` hold, whole and by full name, this rank's part of them."""
    for item in items:
        device = parameter_device(stack.host.chunks[item.site.chunk])
        for key, parameter in list(item.adapter.named_parameters()):
            full, record = tensors.get(f"{name}.{item.site.name}.{key}"), record_of(parameter)
            if full is None or tuple(full.shape) != record.sharding.shape:
                continue  # it is told on all ranks together
            head, _, leaf = key.rpartition(".")
            filled = nn.Parameter(record.sharding.take(full, *record.place).to(device), requires_grad=False)
            mark(filled, record)
            item.adapter.get_submodule(head).register_parameter(leaf, filled)


def unfilled(item: Grafted) -> list[str]:
    """Return the names of the tensors of an adapter that have no values yet."""
    return [f"{item.site.name}.{key}" for key, value in item.adapter.named_parameters() if value.is_meta]
