"""Counts what a rank sends: every collective and point-to-point operation below torch.distributed's Python surface."""

from collections import Counter
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

NAMES = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::broadcast_": "broadcast",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::send": "send",
}
RECEIVING = ("c10d::recv_",)
Traffic = dict[str, tuple[int, int]]
"""Operation -> (number of calls, elements of their full tensors: the gathered one, the one before the scatter)."""


class Spy(TorchDispatchMode):
    """Counts the operations on groups of more than one rank, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then do it."""
        name = function.name().partition(".")[0]
        if name.startswith("c10d::") and name not in RECEIVING and _group_size(args) > 1:
            kind = NAMES[name]  # an operation that is not listed must not pass uncounted
            self.calls[kind] += 1
            self.elements[kind] += _elements(kind, args)
        return function(*args, **(kwargs or {}))

    @property
    def traffic(self) -> Traffic:
        """What was counted."""
        return {kind: (self.calls[kind], self.elements[kind]) for kind in sorted(self.calls)}


class SpyOnStep(Callback):
    """Counts what one training step sends, from the batch to the optimizer's step."""

    def __init__(self, step: int) -> None:
        self.step, self.spy, self.tokens = step, Spy(), 0

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        """Start to listen; count the answer tokens of this replica's rows."""
        if batch_idx == self.step:
            self.tokens = int(batch.count_targets())
            self.spy.__enter__()

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop to listen."""
        if batch_idx == self.step:
            self.spy.__exit__(None, None, None)


def _group_size(args: Any) -> int:
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return int(torch._C._distributed_c10d.ProcessGroup.unbox(value).size())
    raise AssertionError("a collective without a process group")


def _elements(kind: str, args: Any) -> int:
    whole = args[1] if kind == "reduce_scatter" else args[0]
    return sum(t.numel() for t in tree_flatten(whole)[0] if isinstance(t, Tensor))
