"""Functions of megatron-core that assume CUDA tensors or NCCL, replaced by ones that hold for CPU tensors and gloo."""

import sys

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from graftwork.errors import ParallelismError


def install() -> None:
    """Replace the functions wherever megatron-core modules have bound them."""
    _rebind("get_pos_emb_on_this_cp_rank", positions_on_this_rank)
    _rebind("maybe_move_tensor_to_cpu", split_sizes_to_host)


def positions_on_this_rank(pos_emb: Tensor, seq_dim: int, cp_group: ProcessGroup | None = None) -> Tensor:
    """Return the zig-zag part of ``pos_emb`` for this context-parallel rank (megatron-core pins and moves to CUDA)."""
    if cp_group is None:
        raise ParallelismError("the position embedding of a context-parallel rank needs its process group.")
    size, rank = cp_group.size(), cp_group.rank()
    chunks = pos_emb.chunk(2 * size, seq_dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], seq_dim)


def split_sizes_to_host(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Return split sizes as numpy also when they are on the CPU already; gloo's all-to-all refuses tensors."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _rebind(name: str, replacement: object) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("megatron.core") and name in vars(module):
            setattr(module, name, replacement)
