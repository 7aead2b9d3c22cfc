"""The tensors of an artifact: brought together from every rank's parts, and filled into attached adapters."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from graftwork.errors import ArtifactError, quoted
from graftwork.parallel.collective import agreed, gather_objects
from graftwork.parallel.record import record_of
from graftwork.parallel.sharding import Sharding, Source
from graftwork.parallel.state import dp_group, expert_dp_group, tp_rank
from graftwork.peft.artifact.config import ArtifactConfig
from graftwork.peft.artifact.verified import VerifiedFile, stored_tensors
from graftwork.peft.outline import Outline
from graftwork.peft.stack import Stack
from graftwork.peft.trained import TrainedTensor


@dataclass(frozen=True)
class Part:
    """One rank's part of a full tensor, on its way to the first rank."""

    sharding: Sharding
    rank: int
    size: int
    tensor: Tensor


def bring_together(stack: Stack, names: Sequence[str]) -> dict[str, Tensor] | None:
    """Return the full fp32 CPU tensors ``<adapter>.<site>.<tensor>`` on global rank 0, None on the others.

    Collective. Each distinct part travels once: replicas of data-parallel and tensor-parallel ranks send nothing.
    """
    sent = gather_objects({key: part for name in names for key, part in _parts(stack, name).items()})
    return None if sent is None else _joined(sent)


class Shaped(Source, Protocol):
    """A tensor that is read by slices and tells its shape beforehand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...


@dataclass(frozen=True)
class Contents:
    """The tensors in an artifact's file that belong to adapters ``names``; ``path`` is what an error calls it."""

    path: str
    stored: Mapping[str, Shaped]
    names: Sequence[str]

    @classmethod
    def of(cls, file: VerifiedFile, config: ArtifactConfig, names: Sequence[str]) -> "Contents":
        """Return those of ``names``; raises ArtifactError unless the file is a whole safetensors file, all fp32."""
        others = {entry.name for entry in config.adapters} - set(names)
        stored = stored_tensors(file)
        mine = {key: tensor for key, tensor in stored.items() if key.partition(".")[0] not in others}
        return cls(quoted(file.path.parent), mine, names)

    def check(self, outlines: Sequence[Outline], expected: Collection[str]) -> None:
        """Raise ArtifactError for unknown, missing and misshapen tensors, before any is read.

        ``expected`` names the tensors of the whole model, ``outlines`` hold those of this rank.
        """
        unknown, missing = sorted(self.stored.keys() - set(expected)), sorted(set(expected) - self.stored.keys())
        if unknown:
            raise ArtifactError(
                f"{self.path} holds {len(unknown)} tensors its stack does not have, e.g. {quoted(unknown[0])}."
            )
        if missing:
            raise ArtifactError(f"{self.path} lacks {len(missing)} tensors of its stack, e.g. {missing[0]!r}.")
        for key, shape in (item for outline in outlines for item in outline.shapes.items()):
            held = self.stored[key].shape
            if held != shape:
                raise ArtifactError(
                    f"Tensor {key!r} in {self.path} has shape {list(held)}, but the model needs {list(shape)}."
                )

    def value(self, tensor: TrainedTensor) -> Tensor:
        """Return this rank's part of one tensor; raises ArtifactError when it holds NaN or Inf."""
        record = record_of(tensor.parameter)
        value = record.sharding.read(self.stored[tensor.key], *record.place)
        if not torch.isfinite(value).all():
            raise ArtifactError(f"Tensor {tensor.key!r} in {self.path} holds NaN or Inf.")
        return value


@contextmanager
def filled(stack: Stack, contents: Contents) -> Iterator[None]:
    """Copy tensors into the attached adapters; when the block raises, each has its value of before again.

    Tensors that the file, once it was checked, does not hold are those of further tasks: they keep their values.
    Raises ArtifactError on every rank and before any value is changed. Each rank reads only its slices.
    """
    wanted = [t for name in contents.names for t in stack.tensors(name) if t.key in contents.stored]

    def read() -> list[Tensor]:
        _check_open(stack, contents.names)
        try:
            return [contents.value(tensor) for tensor in wanted]
        except OSError as error:
            raise ArtifactError(f"{contents.path} cannot be read: {error.strerror}.") from error

    values, before = agreed(read), [tensor.value.clone() for tensor in wanted]
    done = False
    try:
        for tensor, value in zip(wanted, values):
            tensor.value.copy_(value)
        yield
        done = True
    finally:
        for tensor, value in zip(wanted, before if not done else ()):
            tensor.value.copy_(value)


def _parts(stack: Stack, name: str) -> dict[str, Part]:
    """Return the parts that this rank has to send: what no rank before it in the groups of its replicas sends."""
    parts: dict[str, Part] = {}
    for tensor in stack.tensors(name):
        record = record_of(tensor.parameter)
        rank, size = record.place
        if _speaks(record.expert) and not record.copy and (record.sharding.dim is not None or rank == 0):
            parts[tensor.key] = Part(record.sharding, rank, size, tensor.value.cpu())
    for derived in stack.derived(name):
        if _speaks(derived.expert) and (derived.expert or tp_rank() == 0):
            parts[derived.key] = Part(Sharding(tuple(derived.value.shape)), 0, 1, derived.value.cpu())
    return parts


def _speaks(expert: bool) -> bool:
    """Tell whether this rank is the one that speaks for its data-parallel replicas."""
    group = expert_dp_group() if expert else dp_group(with_context_parallel=True)
    return not dist.is_initialized() or dist.get_rank(group) == 0


def _joined(sent: Sequence[dict[str, Part]]) -> dict[str, Tensor]:
    collected: dict[str, dict[int, Part]] = defaultdict(dict)
    for parts in sent:
        for key, part in parts.items():
            collected[key][part.rank] = part
    return {key: _join(parts) for key, parts in sorted(collected.items())}


def _join(parts: dict[int, Part]) -> Tensor:
    first = parts[min(parts)]
    ranks = [first] if first.sharding.dim is None else [parts[rank] for rank in range(first.size)]
    return first.sharding.join([part.tensor for part in ranks]).to(torch.float32).contiguous().clone()


def _check_open(stack: Stack, names: Sequence[str]) -> None:
    for name in names:
        if stack.folded(name):
            raise ArtifactError(f"Adapter {name!r} is merged into the base; unmerge it before loading its values.")
