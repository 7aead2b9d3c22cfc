"""What every adapter module shares: parallel-aware parameters, on/off state, checkpoint keys, merging."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.parallel.sharded_tensor import sharded_tensor
from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import tp_rank, tp_size

Initializer = Callable[[Tensor, torch.Generator], None]
"""Fills a full, un-sharded fp32 CPU tensor in place from a generator."""


@dataclass(frozen=True)
class Birth:
    """Where an adapter is born: all that its initial values may depend on, and the device they go to."""

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

    Parameters are fp32 and cast to the activations' dtype at use. ``parallel`` is False inside experts, whose
    weights are whole on every tensor-parallel rank.
    """

    mergeable = False
    why_not_mergeable = "its effect is not a change of one weight"

    def __init__(self, birth: Birth, parallel: bool = True) -> None:
        super().__init__()
        self.birth = birth
        self.parallel = parallel
        self.enabled = True
        self.merged = False

    @property
    def tp(self) -> tuple[int, int]:
        """Return (rank, size) of the tensor-parallel group that cuts this adapter's tensors."""
        return (tp_rank(), tp_size()) if self.parallel else (0, 1)

    def new_parameter(self, name: str, sharding: Sharding, init: Initializer, summed: bool = False) -> None:
        """Register fp32 parameter ``name``: this rank's part of one full tensor drawn independently of the layout.

        ``summed``: its gradient is partial on each tensor-parallel rank and must be summed over the group
        (megatron-core's ``sequence_parallel`` flag on parameters).
        """
        rank, size = self.tp
        if self.birth.device.type == "meta":
            local = torch.empty(sharding.local_shape(size), device="meta")
        else:
            full = torch.empty(sharding.shape, dtype=torch.float32)
            init(full, self.birth.generator(name))
            local = sharding.take(full, rank, size).clone().to(self.birth.device)
        parameter = nn.Parameter(local)
        mark(parameter, sharding, summed, expert=not self.parallel)
        self.register_parameter(name, parameter)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return megatron-core ShardedTensors of this adapter's parameters.

        megatron-core joins equal layers (and experts) into one tensor with a leading axis and passes this one's place
        on it; adapters may stand in some layers only, so the place becomes part of the key instead.
        """
        place = "".join(f".{index}" for _, index, _ in sharded_offsets)
        return {
            f"{prefix}{name}": sharded_tensor(f"{prefix}{name}{place}", p, sharding_of(p), self.tp)
            for name, p in self.named_parameters()
        }

    def merged_weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return fp32 (weight, bias) of the base linear with this adapter folded in; only when ``mergeable``."""
        raise TypeError(f"{type(self).__name__} cannot be merged: {self.why_not_mergeable}")

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return derived tensors that are saved beside the parameters (a baked prompt table); none by default."""
        return {}

    def moved(self) -> bool:
        """Tell whether training has changed this adapter from its birth (used by the self check at the end)."""
        return True


def mark(parameter: nn.Parameter, sharding: Sharding, summed: bool, expert: bool = False) -> None:
    """Set the attributes that gradient reduction, clipping and checkpoints read from a parameter."""
    attributes: dict[str, Any] = {
        "sharding": sharding,
        "sequence_parallel": summed,
        "tensor_model_parallel": sharding.dim is not None and not expert,
        "partition_dim": -1 if sharding.dim is None else sharding.dim,
        "partition_stride": sharding.blocks,
        "allreduce": not expert,
    }
    for key, value in attributes.items():
        setattr(parameter, key, value)


def sharding_of(parameter: Tensor) -> Sharding:
    """Return the ``Sharding`` that was attached to an adapter parameter."""
    return parameter.sharding  # type: ignore[attr-defined]


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
