"""Bring every core parameter, whole, to rank 0, one at a time, in an order that all ranks know."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from graftwork import parallel
from graftwork.models.weights.load import Modules, base_parameters
from graftwork.models.weights.mapping import Mapping, Rule
from graftwork.parallel.collective import all_gather_objects


@dataclass(frozen=True)
class Located:
    """A rule, the pipeline stage that holds its parameter, and the parameter's dtype."""

    rule: Rule
    stage: int
    dtype: torch.dtype


class Gatherer:
    """The parameters of the whole model, seen from every rank; a collective over all ranks of one model replica."""

    def __init__(self, module: Modules, mapping: Mapping) -> None:
        """Exchange which stage holds what."""
        self.local = dict(base_parameters(module))
        held = all_gather_objects({n: p.dtype for n, p in self.local.items()}, parallel.pp_group())
        self.located: list[Located] = []
        for rule in mapping.expanded():
            stages = [stage for stage, names in enumerate(held) if rule.core in names]
            if stages and not rule.alias:
                self.located.append(Located(rule, stages[0], held[stages[0]][rule.core]))
        # Wide dtypes first: that is the order the file format needs.
        self.located.sort(key=lambda located: -located.dtype.itemsize)

    def full(self, located: Located) -> Tensor | None:
        """Return the whole parameter on global rank 0 (on the CPU), None on every other rank."""
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

    def _move(self, located: Located, tensor: Tensor | None) -> Tensor | None:
        """Send a later stage's parameter to the first stage."""
        group = parallel.pp_group()
        if parallel.pp_rank() == located.stage and tensor is not None:
            flat = tensor.contiguous().flatten().view(torch.uint8)
            dist.send(flat, dst=_global(group, 0), group=group)
        if parallel.pp_rank() != 0:
            return None
        device = next(iter(self.local.values())).device
        whole = torch.empty(located.rule.op.sharding.shape, dtype=located.dtype, device=device)
        dist.recv(whole.flatten().view(torch.uint8), src=_global(group, located.stage), group=group)
        return whole

    def tensors(self) -> Iterator[tuple[Located, Tensor | None]]:
        """Yield every parameter in model order; every rank must exhaust it."""
        for located in self.located:
            yield located, self.full(located)


def _global(group: dist.ProcessGroup, rank: int) -> int:
    return dist.get_global_rank(group, rank)
