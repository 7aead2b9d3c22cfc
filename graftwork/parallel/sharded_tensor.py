"""Sharding -> megatron-core's ShardedTensor, for state that dist_checkpointing writes."""

from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from torch import Tensor

from graftwork.parallel.sharding import Sharding
from graftwork.parallel.state import dp_rank, tp_rank, tp_size


def sharded_tensor(
    key: str, data: Tensor, sharding: Sharding, tp: tuple[int, int] | None = None
) -> ShardedTensor | ShardedTensorFactory:
    """Describe this rank's part ``data`` of one full tensor to dist_checkpointing.

    ``tp`` is (rank, size) of the group that cuts it: (0, 1) inside experts, which are whole on every tensor rank.
    """
    rank, ranks = tp or (tp_rank(), tp_size())
    size = 1 if sharding.dim is None else ranks
    axis = sharding.dim or 0
    replica = (0, rank if size == 1 else 0, dp_rank(with_context_parallel=True))

    def cut(name: str, tensor: Tensor, index: int, count: int, replica_id: ReplicaId) -> ShardedTensor:
        cuts = [(axis, index, count)] if count > 1 else []
        part: ShardedTensor = ShardedTensor.from_rank_offsets(
            name, tensor, *cuts, replica_id=replica_id, allow_shape_mismatch=padded
        )
        return part

    padded = sharding.padded is not None
    if sharding.blocks == 1 or size == 1:
        return cut(key, data, rank if size > 1 else 0, size, replica)

    def split(name: str, tensor: Tensor, replica_id: ReplicaId, _: object) -> list[ShardedTensor]:
        blocks = tensor.chunk(sharding.blocks, dim=sharding.dim or 0)
        count = sharding.blocks * size
        return [cut(name, b, i * size + rank, count, replica_id) for i, b in enumerate(blocks)]

    def join(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=sharding.dim or 0)

    return ShardedTensorFactory(key, data, split, join, replica)  # type: ignore[arg-type]  # lists, as megatron-core's own
