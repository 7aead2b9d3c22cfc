"""What every rank must know of the others to decide alike."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def largest(values: Sequence[float]) -> list[float]:
    """Return the largest of each value over all ranks of the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    tensor = torch.tensor([float(value) for value in values], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor]
