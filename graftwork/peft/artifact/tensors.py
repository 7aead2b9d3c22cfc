"""The tensors of an artifact: brought together from every rank's parts, and filled into attached adapters."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftwork.errors import ArtifactError
from graftwork.parallel.collective import agreed, gather_objects
from graftwork.parallel.record import Record, record_of
from graftwork.parallel.sharding import Sharding, Source
from graftwork.parallel.state import dp_group, expert_dp_group, tp_rank
from graftwork.peft.artifact.config import ArtifactConfig
from graftwork.peft.stack import Stack
from graftwork.peft.trained import TrainedTensor

TENSORS = "adapter_model.safetensors"


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


def fill(stack: Stack, path: str | Path, config: ArtifactConfig, names: Sequence[str]) -> None:
    """Copy the tensors of adapters ``names`` into the model; each rank reads only its slices.

    ``config`` is the artifact's. Raises ArtifactError on unknown, missing or misshapen tensors and on NaN or Inf, on
    every rank and before any value is changed.
    """
    wanted = [tensor for name in names for tensor in stack.tensors(name)]
    derived = [tensor.key for name in names for tensor in stack.derived(name)]  # nothing reads them
    expected = set(stack.host.everywhere([*(tensor.key for tensor in wanted), *derived]))
    others = {entry["hyperparameters"]["name"] for entry in config["adapters"]} - set(names)

    def read() -> list[Tensor]:
        _check_open(stack, names)
        return _read(Path(path), wanted, expected, others)

    for tensor, value in zip(wanted, agreed(read)):
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


def _read(path: Path, wanted: Sequence[TrainedTensor], expected: set[str], others: set[str]) -> list[Tensor]:
    try:
        with safe_open(path / TENSORS, "pt") as file:
            held = {key for key in file.keys() if key.partition(".")[0] not in others}  # noqa: SIM118
            _check_names(held, expected, path)
            return [_value(file.get_slice(t.key), record_of(t.parameter), t.key, path) for t in wanted]
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{TENSORS} in {str(path)!r} cannot be read ({error}); it is truncated.") from error


def _check_names(held: set[str], expected: set[str], path: Path) -> None:
    unknown, missing = sorted(held - expected), sorted(expected - held)
    if unknown:
        raise ArtifactError(f"{str(path)!r} holds {len(unknown)} tensors its stack does not have, e.g. {unknown[0]!r}.")
    if missing:
        raise ArtifactError(f"{str(path)!r} lacks {len(missing)} tensors of its stack, e.g. {missing[0]!r}.")


def _value(source: Source, record: Record, key: str, path: Path) -> Tensor:
    sharding = record.sharding
    if tuple(source.get_shape()) != sharding.shape:
        raise ArtifactError(
            f"Tensor {key!r} in {str(path)!r} has shape {source.get_shape()}, but the model needs "
            f"{list(sharding.shape)}."
        )
    value = sharding.read(source, *record.place)
    if not torch.isfinite(value).all():
        raise ArtifactError(f"Tensor {key!r} in {str(path)!r} holds NaN or Inf.")
    return value
