"""The record on a parameter: whose it is, how it is cut, who holds copies and who parts of its gradient.

Optimizer, gradient sums, artifact, training state and self checks see trained *tensors* through ``record_of``; none of
them asks for names, modules or attributes of its own.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import is_initialized, tp_rank, tp_size

BASE = "base"
"""Who trains what no transform owns."""
_ATTRIBUTE = "graftwork_record"


@dataclass(frozen=True)
class Record:
    """What holds of one parameter in every layout.

    sharding: the full tensor's shape and how it is cut over tensor-parallel ranks. owner: name of the transform that
    trains it, None: the base. expert: it belongs to one expert, so it is whole on every tensor-parallel rank and its
    copies are on the expert-data-parallel ranks. partial: its gradient is only a part on each tensor-parallel rank, to
    be summed. copy: a tied copy of a tensor that another pipeline stage owns; it counts nowhere.
    """

    sharding: Sharding
    owner: str | None = None
    expert: bool = False
    partial: bool = False
    copy: bool = False

    @property
    def cut(self) -> bool:
        """Whether each tensor-parallel rank holds another part of it."""
        return self.sharding.dim is not None and not self.expert

    @property
    def place(self) -> tuple[int, int]:
        """(rank, size) of the group that cuts it: the tensor-parallel one, or (0, 1) inside experts."""
        return (tp_rank(), tp_size()) if is_initialized() and not self.expert else (0, 1)


def mark(parameter: nn.Parameter, record: Record) -> None:
    """Set the record, and the attributes by which megatron-core knows the same facts."""
    sharding = record.sharding
    setattr(parameter, _ATTRIBUTE, record)
    attributes = {
        "sequence_parallel": record.partial,
        "tensor_model_parallel": record.cut,
        "partition_dim": -1 if sharding.dim is None else sharding.dim,
        "partition_stride": sharding.blocks,
        "allreduce": not record.expert,
    }
    for name, value in attributes.items():
        setattr(parameter, name, value)


def note(parameter: nn.Parameter, record: Record) -> None:
    """Set the record of a base parameter, whose attributes megatron-core has set itself."""
    setattr(parameter, _ATTRIBUTE, record)


def record_of(parameter: Tensor) -> Record:
    """Return the record; a parameter that nobody has marked is read from megatron-core's attributes."""
    found = getattr(parameter, _ATTRIBUTE, None)
    return found if isinstance(found, Record) else _from_attributes(parameter)


def owner_of(parameter: Tensor) -> str:
    """Return the name of the transform that trains ``parameter``, ``base`` for the base."""
    return record_of(parameter).owner or BASE


def give_to(parameter: nn.Parameter, owner: str | None) -> None:
    """Make ``owner`` the one who trains ``parameter`` (None: the base again)."""
    note(parameter, replace(record_of(parameter), owner=owner))


def _from_attributes(parameter: Tensor) -> Record:
    shape, dim = list(parameter.shape), None
    expert = not getattr(parameter, "allreduce", True)
    if getattr(parameter, "tensor_model_parallel", False) and not expert:
        dim = int(getattr(parameter, "partition_dim", 0))
        shape[dim] *= tp_size() if is_initialized() else 1
    return Record(
        Sharding(tuple(shape), dim),
        expert=expert,
        partial=bool(getattr(parameter, "sequence_parallel", False)),
        copy=bool(getattr(parameter, "shared", False)),
    )
