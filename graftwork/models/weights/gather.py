"""Bring every core parameter, whole, to rank 0, one at a time, in an order that all ranks know."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from graftwork import parallel
from graftwork.models.weights.load import Modules, base_parameters
from graftwork.models.weights.mapping import Mapping, Rule
from graftwork.parallel.collective import all_gather_objects, world_rank
from graftwork.parallel.names import in_expert


@dataclass(frozen=True)
class Located:
    """A rule, the pipeline stage that holds its parameter, and the parameter's dtype.

    ``holder``: the rank that holds it where experts are spread over ranks, whole; None: every rank of the stage.
    """

    rule: Rule
    stage: int
    dtype: torch.dtype
    holder: int | None = None


class Gatherer:
    """The parameters of the whole model, seen from every rank; a collective over the ranks that take part."""

    @staticmethod
    def takes_part() -> bool:
        """Whether this rank is one of the gathering: those of the first replica; all, where experts are spread."""
        return parallel.ep_size() > 1 or _in_first_replica()

    def __init__(self, module: Modules, mapping: Mapping) -> None:
        """Exchange which stage holds what, and which rank which expert."""
        self.local = dict(base_parameters(module))
        held = all_gather_objects({n: p.dtype for n, p in self.local.items()}, parallel.pp_group())
        holders = self._holders() if parallel.ep_size() > 1 else {}
        self.located: list[Located] = []
        for rule in mapping.expanded():
            stages = [stage for stage, names in enumerate(held) if rule.core in names]
            if rule.core in holders:
                self.located.append(Located(rule, 0, *holders[rule.core]))
            elif stages and not rule.alias:
                self.located.append(Located(rule, stages[0], held[stages[0]][rule.core]))
        # Wide dtypes first: that is the order the file format needs.
        self.located.sort(key=lambda located: -located.dtype.itemsize)

    def _holders(self) -> dict[str, tuple[torch.dtype, int]]:
        """Return dtype and first rank of every expert's parameters."""
        here = {name: parameter.dtype for name, parameter in self.local.items() if in_expert(name)}
        found: dict[str, tuple[torch.dtype, int]] = {}
        for rank, names in enumerate(all_gather_objects(here)):
            for name, dtype in names.items():
                found.setdefault(name, (dtype, rank))
        return found

    def full(self, located: Located) -> Tensor | None:
        """Return the whole parameter on global rank 0 (on the CPU), None on every other rank."""
        if located.holder is not None:
            return self._brought(located, located.holder)
        if not _in_first_replica():
            return None
        tensor = None
        if parallel.pp_rank() == located.stage:
            tensor = self._join(located.rule)
        if located.stage != 0 and parallel.tp_rank() == 0:
            tensor = self._move(located, tensor)
        return tensor.cpu() if tensor is not None and parallel.pp_rank() == 0 else None

    def _join(self, rule: Rule) -> Tensor | None:
        """Gather the cuts on tensor rank 0 of this stage."""
        local, sharding = self.local[rule.core].detach(), rule.op.sharding
        if sharding.dim is None or parallel.tp_size() == 1:
            return sharding.join([local]) if parallel.tp_rank() == 0 else None
        # Bytes: not every backend carries every dtype.
        flat = local.contiguous().flatten().view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(parallel.tp_size())] if parallel.tp_rank() == 0 else None
        dist.gather(flat, parts, dst=_global(parallel.tp_group(), 0), group=parallel.tp_group())
        if parts is None:
            return None
        return sharding.join([part.view(local.dtype).view(local.shape) for part in parts])

    def _brought(self, located: Located, holder: int) -> Tensor | None:
        """Send an expert's parameter from the rank that holds it to rank 0."""
        own = self.local[located.rule.core].detach() if holder == world_rank() else None
        if own is not None and holder != 0:
            dist.send(own.contiguous().flatten().view(torch.uint8), dst=0)
        if world_rank() != 0:
            return None
        if own is None:
            own = self._empty(located)
            dist.recv(own.flatten().view(torch.uint8), src=holder)
        return own.cpu()

    def _empty(self, located: Located) -> Tensor:
        device = next(iter(self.local.values())).device
        return torch.empty(located.rule.op.sharding.shape, dtype=located.dtype, device=device)

    def _move(self, located: Located, tensor: Tensor | None) -> Tensor | None:
        """Send a later stage's parameter to the first stage."""
        group = parallel.pp_group()
        if parallel.pp_rank() == located.stage and tensor is not None:
            flat = tensor.contiguous().flatten().view(torch.uint8)
            dist.send(flat, dst=_global(group, 0), group=group)
        if parallel.pp_rank() != 0:
            return None
        whole = self._empty(located)
        dist.recv(whole.flatten().view(torch.uint8), src=_global(group, located.stage), group=group)
        return whole

    def tensors(self) -> Iterator[tuple[Located, Tensor | None]]:
        """Yield every parameter in model order; every rank must exhaust it."""
        for located in self.located:
            yield located, self.full(located)


def _in_first_replica() -> bool:
    return parallel.dp_rank(with_context_parallel=True) == 0


def _global(group: dist.ProcessGroup, rank: int) -> int:
    return dist.get_global_rank(group, rank)
