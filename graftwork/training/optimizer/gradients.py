"""Gradients of what trains on this rank: summed over the ranks that share a parameter, scaled, measured, clipped."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from graftwork import parallel
from graftwork.optim import MAIN_GRAD, gradient_of
from graftwork.parallel.record import record_of

BUCKET_ELEMENTS = 2**25
"""One all-reduce carries at most this many gradient elements (128 MiB in fp32)."""


class Gradients:
    """The gradients of the trainable parameters in this rank's model ``chunks``; frozen ones get no buffer.

    Low-precision parameters accumulate over the microbatches in fp32 (``main_grad``), fp32 ones in ``.grad``.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self.parameters = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        self.experts = [p for p in self.parameters if record_of(p).expert]
        self.dense = [p for p in self.parameters if not record_of(p).expert]
        self.partial = [p for p in self.parameters if record_of(p).partial]
        self.tied = _tied_embedding(chunks)
        self.has_experts = getattr(chunks[0].config, "num_moe_experts", None) is not None
        self.norm = torch.zeros(())
        self._measured = [p for p in self.dense if _counts(p)]
        self._device = next(chunks[0].parameters()).device
        self._hooks = [_accumulate_in_fp32(p) for p in self.parameters if p.dtype != torch.float32]

    def zero(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self.parameters:
            parameter.grad = None
            if parameter.dtype != torch.float32:
                getattr(parameter, MAIN_GRAD).zero_()

    def finish(self, tokens: Tensor) -> None:
        """Turn gradients of this rank's loss *sum* into those of the global batch's mean over ``tokens``."""
        for parameter in self.parameters:
            if gradient_of(parameter) is None:  # an adapter that no microbatch reached, e.g. an idle expert
                parameter.grad = torch.zeros_like(parameter)
        self._sum()
        every = self._of(self.parameters)
        if every:
            torch._foreach_mul_(every, 1.0 / tokens.clamp(min=1).item())
        self.norm = self._global_norm()

    def clip(self, limit: float) -> None:
        """Scale the gradients so that their global norm is at most ``limit``."""
        factor = (limit / (self.norm + 1e-6)).clamp(max=1.0)
        every = self._of(self.parameters)
        if every:
            torch._foreach_mul_(every, factor.to(every[0].device))

    def clip_values(self, limit: float) -> None:
        """Clamp every element of the gradients to [-limit, limit]."""
        for gradient in self._of(self.parameters):
            gradient.clamp_(-limit, limit)

    def release(self) -> None:
        """Remove the hooks and fp32 accumulators from the parameters."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters:
            if hasattr(parameter, MAIN_GRAD):
                delattr(parameter, MAIN_GRAD)

    def _sum(self) -> None:
        all_reduce(self._of(self.partial), parallel.tp_group())
        if self.tied is not None:
            all_reduce(self._of([self.tied]), parallel.embedding_group())
        all_reduce(self._of(self.dense), parallel.dp_group(with_context_parallel=True))
        all_reduce(self._of(self.experts), parallel.expert_dp_group())

    def _global_norm(self) -> Tensor:
        """L2 norm over the whole model: copies on other tensor ranks and of tied embeddings count once."""
        squares = self._squares(self._measured)
        dist.all_reduce(squares, group=parallel.model_parallel_group())
        if self.has_experts:
            expert = self._squares(self.experts)
            dist.all_reduce(expert, group=parallel.model_parallel_group(expert=True))
            squares = squares + expert
        return squares.sqrt()

    def _squares(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        if not parameters:
            return torch.zeros((), device=self._device)
        return torch.stack(torch._foreach_norm(self._of(parameters), 2)).float().square().sum()

    @staticmethod
    def _of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        return [g for g in map(gradient_of, parameters) if g is not None]


def all_reduce(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Sum ``tensors`` in place over ``group``, in flat buckets of one dtype; nothing is sent for nothing to sum."""
    if group.size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket])):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket: list[Tensor] = []
        for tensor in (t for t in tensors if t.dtype == dtype):
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def _counts(parameter: nn.Parameter) -> bool:
    """Return whether this rank's copy enters the norm."""
    record = record_of(parameter)
    return (record.cut or parallel.tp_rank() == 0) and not record.copy


def _tied_embedding(chunks: Sequence[nn.Module]) -> nn.Parameter | None:
    """Return the trainable embedding that the first and the last pipeline stage both hold, if this rank holds it."""
    if parallel.pp_size() == 1 or not (parallel.is_first_stage() or parallel.is_last_stage()):
        return None
    chunk = chunks[0] if parallel.is_first_stage() else chunks[-1]
    shared: Callable[[], nn.Parameter] | None = getattr(chunk, "shared_embedding_or_output_weight", None)
    if shared is None or not getattr(chunk, "share_embeddings_and_output_weights", False):
        return None
    weight = shared()
    return weight if weight.requires_grad else None


def _accumulate_in_fp32(parameter: nn.Parameter) -> RemovableHandle:
    accumulator = torch.zeros_like(parameter, dtype=torch.float32)
    setattr(parameter, MAIN_GRAD, accumulator)

    def move(p: Tensor) -> None:
        assert p.grad is not None
        accumulator.add_(p.grad)
        p.grad = None

    hook: RemovableHandle = parameter.register_post_accumulate_grad_hook(move)
    return hook
