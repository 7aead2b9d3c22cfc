"""Bucket: trained parameters whose gradients are summed over a group in one message, whole or each rank its shard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work

from graftwork.optim import MAIN_GRAD, gradient_of
from graftwork.parallel.collective import all_gather_flat, reduce_scatter_flat

BUCKET_ELEMENTS = 2**23
"""One message carries at most this many gradient elements (32 MiB in fp32), or one parameter."""


@dataclass(frozen=True, eq=False)
class Piece:
    """What ``rank``'s shard holds of the parameter ``whole``: elements [start, stop) of it laid flat.

    ``parameter`` is them, on ``whole``'s own memory: what an optimizer steps there.
    """

    whole: nn.Parameter
    start: int
    stop: int
    rank: int
    parameter: nn.Parameter


class Bucket:
    """The gradients of ``parameters``, of one dtype, laid end to end and summed over ``group``.

    Cut into as many equal shards as the group has ranks. ``sharded``: a rank keeps the sums of its own shard only, and
    steps and holds moments of its own pieces (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, stages 1 and 2); else
    every rank has all sums. Low-precision parameters accumulate in fp32 (``main_grad``), others in ``.grad``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: ProcessGroup, sharded: bool) -> None:
        self.parameters, self.group = list(parameters), group
        self.sharded = sharded and group.size() > 1
        self.low = self.parameters[0].dtype != torch.float32
        self._starts = [0, *accumulate(p.numel() for p in self.parameters)]
        self.part = -(-self._starts[-1] // group.size())
        self.pieces = list(self._cut())
        self.own = [piece for piece in self.pieces if piece.rank == group.rank()] if self.sharded else self.pieces
        self._work: Work | None = None
        self._shard: Tensor | None = None
        self._flat = self._accumulators() if self.low else None
        self.sent = False

    def zero(self) -> None:
        """Forget the gradients of the last step."""
        self.sent, self._shard = False, None
        for parameter in (*self.parameters, *(piece.parameter for piece in self.own)):
            parameter.grad = None
        if self.low and self._flat is not None:
            self._flat.zero_()

    def fill(self) -> None:
        """Give a zero to what no microbatch has reached, such as an idle expert, unless the sum is on its way."""
        for parameter in self.parameters if not self.sent else ():
            if gradient_of(parameter) is None:
                parameter.grad = torch.zeros_like(parameter)

    def send(self) -> None:
        """Begin to sum; every rank of the group sends its buckets in the same order."""
        self.fill()
        self.sent = True
        if self.group.size() == 1:
            return
        flat = self._laid_flat()
        if self.sharded:
            self._shard = flat.new_empty(self.part)
            self._work = reduce_scatter_flat(self._shard, flat, self.group)
        else:
            self._work = dist.all_reduce(flat, group=self.group, async_op=True)
        if not self.low:
            self._flat = flat
            self._show(flat)

    def wait(self) -> None:
        """Wait for the sums."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if not self.low:
            self._flat = None
        for piece, sums in zip(self.own, self.sums()) if self.sharded else ():
            setattr(piece.parameter, MAIN_GRAD if self.low else "grad", sums)

    def sums(self) -> list[Tensor]:
        """Return the flat gradient of each of this rank's own pieces."""
        if self._shard is not None:
            sizes = [piece.stop - piece.start for piece in self.own]
            return list(self._shard[: sum(sizes)].split(sizes))
        found = []
        for piece in self.own:
            gradient = gradient_of(piece.whole)
            assert gradient is not None, "it was filled"
            found.append(gradient.reshape(-1)[piece.start : piece.stop])
        return found

    def tensors(self) -> list[Tensor]:
        """Return what scaling and clamping must act on."""
        if self._shard is not None:
            return [self._shard]
        return [gradient for gradient in map(gradient_of, self.parameters) if gradient is not None]

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the parameters together from all ranks' shards after a step."""
        if not self.sharded:
            return
        first = self.parameters[0]
        shard = torch.cat([*(piece.parameter for piece in self.own), first.new_empty(0)])
        shard = nn.functional.pad(shard, (0, self.part - len(shard)))
        flat = first.new_empty(self.part * self.group.size())
        all_gather_flat(flat, shard, self.group)
        for parameter, start in zip(self.parameters, self._starts):
            parameter.copy_(flat[start : start + parameter.numel()].view_as(parameter))

    def release(self) -> None:
        """Free the accumulators."""
        self._flat = self._shard = None
        for parameter in (*self.parameters, *(piece.parameter for piece in self.own)):
            if hasattr(parameter, MAIN_GRAD):
                delattr(parameter, MAIN_GRAD)

    def _cut(self) -> Iterator[Piece]:
        for parameter, first in zip(self.parameters, self._starts):
            parameter.data = parameter.data.contiguous()
            flat = parameter.detach().reshape(-1)
            for rank in range(first // self.part, self.group.size()) if parameter.numel() else ():
                start, stop = max(rank * self.part - first, 0), min((rank + 1) * self.part - first, len(flat))
                if start < stop:
                    yield Piece(parameter, start, stop, rank, nn.Parameter(flat[start:stop]))

    def _laid_flat(self) -> Tensor:
        """Return the gradients end to end, with what makes the shards equal behind them."""
        if self._flat is not None:
            return self._flat
        flat = torch.cat([gradient.flatten() for gradient in self.tensors()])
        return nn.functional.pad(flat, (0, self.part * self.group.size() - len(flat)))

    def _show(self, flat: Tensor) -> None:
        """Let gradients be parts of ``flat``, in which they are summed; of a sharded bucket its pieces have them."""
        for parameter, start in zip(self.parameters, self._starts):
            whole = flat[start : start + parameter.numel()].view_as(parameter)
            parameter.grad = None if self.sharded else whole

    def _accumulators(self) -> Tensor:
        first = self.parameters[0]
        flat = torch.zeros(self.part * self.group.size(), dtype=torch.float32, device=first.device)
        for parameter, start in zip(self.parameters, self._starts):
            setattr(parameter, MAIN_GRAD, flat[start : start + parameter.numel()].view_as(parameter))
        return flat
