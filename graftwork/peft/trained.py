"""The tensors that a stack trains, whoever holds them: adapters beside the base, or the base itself."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from graftwork.errors import MatchError
from graftwork.parallel.record import give_to, record_of
from graftwork.peft.sites import BaseTensor


@dataclass(frozen=True)
class TrainedTensor:
    """One tensor that a transform trains: adapter, global name of the module it stands at, its own name there.

    ``parameter`` carries the record; ``value`` is where the trained value stands now, which is elsewhere while a base
    tensor holds its original value, or one with adapters merged into it.
    """

    adapter: str
    site: str
    name: str
    parameter: nn.Parameter
    value: Tensor

    @property
    def key(self) -> str:
        """Name in an artifact: ``<adapter>.<site>.<tensor>``."""
        return f"{self.adapter}.{self.site}.{self.name}"


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor that follows from trained ones and is saved beside them; whole on every tensor-parallel rank."""

    key: str
    value: Tensor
    expert: bool


class LentTensor:
    """A tensor of the base that a transform trains, with the value it had before.

    ``held`` is the value that the parameter does not show: the original one, or the trained one while the original
    is shown. Making one makes ``owner`` the parameter's owner.
    """

    def __init__(self, tensor: BaseTensor, owner: str) -> None:
        self.tensor = tensor
        self.parameter = tensor.parameter
        self.held = tensor.parameter.detach().clone()
        give_to(self.parameter, owner)

    def exchange(self) -> None:
        """Show the value that is held and hold the one that was shown."""
        shown = self.parameter.detach().clone()
        self.parameter.detach().copy_(self.held)
        self.held = shown

    def give_back(self) -> None:
        """Restore value, owner and frozenness; call it while the trained value is shown."""
        self.parameter.detach().copy_(self.held)
        self.parameter.grad = None
        self.parameter.requires_grad_(False)
        give_to(self.parameter, None)


def check_free(tensors: Sequence[BaseTensor], merged: Container[int], who: str) -> None:
    """Raise MatchError when another transform trains one of ``tensors``, or it is among the ``merged`` (by id)."""
    for tensor in tensors:
        owner = record_of(tensor.parameter).owner
        if owner is not None:
            raise MatchError(f"{who} cannot train {tensor.name}: adapter {owner!r} does; leave it out of one of them.")
        if id(tensor.parameter) in merged:
            raise MatchError(f"{who} cannot train {tensor.name}: adapters are merged into it; unmerge first.")
