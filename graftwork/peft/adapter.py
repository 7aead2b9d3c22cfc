"""What every adapter module shares: parallel-aware parameters, on/off state, checkpoint keys, merging."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import Tensor, nn

from graftwork.parallel.names import in_expert
from graftwork.parallel.record import Record, mark, record_of
from graftwork.parallel.sharded_tensor import sharded_tensor
from graftwork.parallel.sharding import Sharding
from graftwork.peft.routing import acts_on

Initializer = Callable[[Tensor, torch.Generator], None]
"""Fills a full, un-sharded fp32 CPU tensor in place from a generator."""

Inner = Callable[..., Any]
"""What an adapter wraps: a megatron-core module's call, or that of the adapter inside of this one."""

Offsets = tuple[tuple[int, int, int], ...]
"""Places on leading axes, as megatron-core passes them through ``sharded_state_dict``: (axis, index, count)."""


class Product(NamedTuple):
    """The update ``scale * B A`` of a weight, by its trained factors A [r, in] and B [out, r]."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float


@dataclass(frozen=True)
class Birth:
    """Where an adapter is born: all that its drawn initial values may depend on, and the device they go to."""

    seed: int
    adapter: str
    site: str
    device: torch.device

    def generator(self, tensor: str) -> torch.Generator:
        """Return a CPU generator seeded by (seed, adapter name, global site name, tensor name) and nothing else."""
        text = f"{self.seed}/{self.adapter}/{self.site}/{tensor}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))


class Adapter(nn.Module):
    """One adapter at one site: ``forward(inner, *args)`` gets the callable it wraps and its arguments.

    Parameters are fp32 and cast to the activations' dtype at use; their records say whose they are and how they are
    cut. Inside experts, whose weights are whole on every tensor-parallel rank, so are the adapters.
    """

    mergeable = False
    why_not_mergeable = "its effect is not a change of one weight"
    passive = False
    """Whether it only holds values that other adapters of its transform use, and changes nothing where it stands."""

    def __init__(self, birth: Birth) -> None:
        super().__init__()
        self.birth = birth
        self.enabled = True
        self.merged = False
        self._underived: dict[str, Callable[[], Tensor]] = {}

    def new_parameter(self, name: str, sharding: Sharding, init: Initializer, partial: bool = False) -> None:
        """Register fp32 parameter ``name``: this rank's part of one full tensor drawn independently of the layout.

        ``partial``: its gradient is only a part on each tensor-parallel rank and must be summed over the group.
        """
        record = self._record(sharding, partial)
        rank, size = record.place
        if self.birth.device.type == "meta":
            local = torch.empty(sharding.local_shape(size), device="meta")
        else:
            full = torch.empty(sharding.shape, dtype=torch.float32)
            init(full, self.birth.generator(name))
            local = sharding.take(full, rank, size).clone().to(self.birth.device)
        self._register(name, local, record)

    def derive_parameter(
        self, name: str, sharding: Sharding, value: Callable[[], Tensor], partial: bool = False
    ) -> None:
        """Register fp32 parameter ``name`` whose initial value follows from the base's weights.

        ``value`` returns this rank's part, from this rank's parts of the base. It is called in ``derive``, on all ranks
        together, so that it may talk to other ranks; never on the meta device.
        """
        record = self._record(sharding, partial)
        local = torch.empty(sharding.local_shape(record.place[1]), dtype=torch.float32, device=self.birth.device)
        self._register(name, local, record)
        if self.birth.device.type != "meta":
            self._underived[name] = value

    def derive(self) -> None:
        """Compute the initial values that depend on the base; collective over ranks that share this adapter."""
        with torch.no_grad():
            for name, value in self._underived.items():
                parameter, derived = self.get_parameter(name), value()
                assert derived.shape == parameter.shape, f"{name}: {list(derived.shape)}, not {list(parameter.shape)}"
                parameter.copy_(derived)
        self._underived.clear()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, object] | None = None
    ) -> ShardedStateDict:
        """Return megatron-core ShardedTensors of this adapter's parameters.

        megatron-core joins equal layers (and experts) into one tensor with a leading axis and passes this one's place
        on it; adapters may stand in some layers only, so the place becomes part of the key instead.
        """
        place = "".join(f".{index}" for _, index, _ in sharded_offsets)
        records = [(name, p, record_of(p)) for name, p in self.named_parameters()]
        return {
            f"{prefix}{name}": sharded_tensor(f"{prefix}{name}{place}", p, record.sharding, record.place)
            for name, p, record in records
        }

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return fp32 (weight, bias) of the base linear with this adapter folded in; only when ``mergeable``."""
        raise TypeError(f"{type(self).__name__} cannot be merged: {self.why_not_mergeable}")

    def added(self, output: Tensor, update: Tensor) -> Tensor:
        """Return ``output + update`` [s, b, ...] on rows that are sent to this adapter, ``output`` on the others."""
        here = self._here(update)
        return output + (update if here is None else update * here).to(output.dtype)

    def chosen(self, changed: Tensor, unchanged: Tensor) -> Tensor:
        """Return ``changed`` [s, b, ...] on rows that are sent to this adapter, ``unchanged`` on the others."""
        here = self._here(changed)
        return changed if here is None else torch.where(here, changed, unchanged)

    def products(self) -> Sequence[Product]:
        """Return the terms ``scale * B A`` that it adds to a weight, where that is all it does; none by default."""
        return ()

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return derived tensors that are saved beside the parameters (a baked prompt table); none by default."""
        return {}

    def moved(self) -> bool:
        """Tell whether training has changed this adapter from its birth (used by the self check at the end)."""
        return True

    def _here(self, x: Tensor) -> Tensor | None:
        """Where this adapter acts on ``x``; inside of experts, where tokens have lost their rows, everywhere."""
        return None if in_expert(self.birth.site) else acts_on(self.birth.adapter, x)

    def _record(self, sharding: Sharding, partial: bool) -> Record:
        return Record(sharding, owner=self.birth.adapter, expert=in_expert(self.birth.site), partial=partial)

    def _register(self, name: str, local: Tensor, record: Record) -> None:
        parameter = nn.Parameter(local)
        mark(parameter, record)
        self.register_parameter(name, parameter)


def zeros(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill with zeros."""
    tensor.zero_()


def ones(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill with ones."""
    tensor.fill_(1.0)


def normal(std: float) -> Initializer:
    """Return an initializer drawing from N(0, std^2)."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


def xavier_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """U(-a, a), a = sqrt(6 / (fan_in + fan_out)) of the full matrix [out, in] (Glorot and Bengio 2010)."""
    bound = (6.0 / (tensor.shape[0] + tensor.shape[1])) ** 0.5
    tensor.uniform_(-bound, bound, generator=generator)


def xavier_normal(tensor: Tensor, generator: torch.Generator) -> None:
    """N(0, 2 / (fan_in + fan_out)) of the full matrix [out, in] (Glorot and Bengio 2010)."""
    tensor.normal_(0.0, (2.0 / (tensor.shape[0] + tensor.shape[1])) ** 0.5, generator=generator)


def kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """U(-a, a), a = 1 / sqrt(fan_in): Kaiming with a = sqrt(5), as Hugging Face PEFT initialises lora_A."""
    bound = tensor.shape[1] ** -0.5
    tensor.uniform_(-bound, bound, generator=generator)


INITIALIZERS: dict[str, Initializer] = {
    "zero": zeros,
    "xavier": xavier_uniform,
    "xavier_normal": xavier_normal,
    "kaiming": kaiming_uniform,
    "normal": normal(0.02),
}
