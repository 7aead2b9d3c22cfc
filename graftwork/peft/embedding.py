"""Adapters around the word embedding: where its output stands under sequence parallelism."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from graftwork.parallel.record import record_of
from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import tp_group, tp_rank, tp_size
from graftwork.peft.adapter import Adapter, Birth, Initializer
from graftwork.peft.routing import acts_on_ids
from graftwork.peft.wrapper import original_weight


class EmbeddingLookup(Adapter):
    """Base of adapters that add or replace embedding rows.

    The embedding returns [b, s, h], or this rank's [s/tp, b, h] when it scatters the sequence itself (sequence
    parallelism without learned positions). Only in that second case each rank looks up its own part, so that the
    gradient of a replicated tensor must be summed over the group; in the first the scatter's backward gathers it.
    """

    def __init__(self, birth: Birth, base: nn.Module) -> None:
        super().__init__(birth)
        self.scattered = bool(getattr(base, "reduce_scatter_embeddings", False)) and tp_size() > 1

    def new_matrix(self, name: str, shape: tuple[int, ...], init: Initializer) -> None:
        """Register a replicated parameter whose gradient is summed over the group when lookups are scattered."""
        self.new_parameter(name, Sharding(shape), init, partial=self.scattered)

    def mine(self, ids: Tensor) -> Tensor:
        """Return ``ids``, bool [b, s], without the places of rows that are sent to other adapters."""
        here = acts_on_ids(self.birth.adapter)
        return ids if here is None else ids & here

    def derive_matrix(self, name: str, shape: tuple[int, ...], value: Callable[[], Tensor]) -> None:
        """Register a replicated parameter as ``new_matrix`` does, whose value follows from the base's."""
        self.derive_parameter(name, Sharding(shape), value, partial=self.scattered)

    def base_rows(self, base: nn.Module, ids: Tensor) -> Tensor:
        """Return the base's fp32 embeddings [n, h] of ``ids`` [n] on every rank; collective over those that cut it."""
        weight = original_weight(base).detach()
        record = record_of(base.get_parameter("weight"))
        rank, size = record.place
        held = record.sharding.slices(rank, size)[0] if record.cut else slice(0, len(weight))
        ids = ids.to(weight.device)
        mine = (ids >= held.start) & (ids < held.stop)
        rows = weight[(ids - held.start).masked_fill(~mine, 0)].float() * mine.unsqueeze(1)
        if size > 1:
            dist.all_reduce(rows, group=tp_group())
        return rows

    def like_output(self, values: Tensor) -> Tensor:
        """Bring [b, s, ...] into the layout of the embedding's output."""
        if not self.scattered:
            return values
        return values.transpose(0, 1).chunk(tp_size(), dim=0)[tp_rank()]
