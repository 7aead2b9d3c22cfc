"""Gradients of what trains on this rank: summed over the ranks that share a parameter, scaled, measured, clipped."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from graftwork import parallel
from graftwork.optim import adapter_of, gradient_of

BUCKET_ELEMENTS = 2**25
"""One all-reduce carries at most this many gradient elements (128 MiB in fp32)."""


class Gradients:
    """The gradients of the trainable parameters in this rank's model ``chunks``; frozen ones get no buffer.

    Low-precision parameters accumulate over the microbatches in fp32 (``main_grad``), fp32 ones in ``.grad``.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        # Names repeat from one virtual stage to the next.
        named = [(n, p) for chunk in chunks for n, p in chunk.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.experts = [p for n, p in named if is_expert(n, p)]
        self.dense = [p for n, p in named if not is_expert(n, p)]
        self.partial = [p for n, p in named if is_partial(n, p)]
        self.tied = _tied_embedding(chunks)
        self.has_experts = getattr(chunks[0].config, "num_moe_experts", None) is not None
        self.norm = torch.zeros(())
        self._hooks = [_accumulate_in_fp32(p) for p in self.parameters if p.dtype != torch.float32]

    def zero(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self.parameters:
            parameter.grad = None
            if parameter.dtype != torch.float32:
                parameter.main_grad.zero_()  # type: ignore[attr-defined]

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
            if hasattr(parameter, "main_grad"):
                del parameter.main_grad

    def _sum(self) -> None:
        all_reduce(self._of(self.partial), parallel.tp_group())
        if self.tied is not None:
            all_reduce(self._of([self.tied]), parallel.embedding_group())
        all_reduce(self._of(self.dense), parallel.dp_group(with_context_parallel=True))
        all_reduce(self._of(self.experts), parallel.expert_dp_group())

    def _global_norm(self) -> Tensor:
        """L2 norm over the whole model: copies on other tensor ranks and of tied embeddings count once."""
        squares = self._squares([p for p in self.dense if _counts(p)])
        dist.all_reduce(squares, group=parallel.model_parallel_group())
        if self.has_experts:
            expert = self._squares(self.experts)
            dist.all_reduce(expert, group=parallel.model_parallel_group(expert=True))
            squares = squares + expert
        return squares.sqrt()

    def _squares(self, parameters: list[nn.Parameter]) -> Tensor:
        device = self.parameters[0].device if self.parameters else _device()
        if not parameters:
            return torch.zeros((), device=device)
        return torch.stack(torch._foreach_norm(self._of(parameters), 2)).float().square().sum()

    @staticmethod
    def _of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        return [g for g in map(gradient_of, parameters) if g is not None]


def all_reduce(tensors: list[Tensor], group: ProcessGroup) -> None:
    """Sum ``tensors`` in place over ``group``, in flat buckets of one dtype; nothing is sent for nothing to sum."""
    if group.size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket])):
            tensor.copy_(part.view_as(tensor))


def is_expert(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter belongs to one expert: its replicas are the expert-data-parallel ranks."""
    # megatron-core marks experts only when they are spread over ranks, but with whole experts on every tensor rank
    # (expert tensor parallel size 1) each of those ranks has a partial gradient too.
    return ".experts." in name or not getattr(parameter, "allreduce", True)


def is_partial(name: str, parameter: nn.Parameter) -> bool:
    """Return whether each tensor-parallel rank holds only its part of the gradient's sum.

    True for parameters flagged ``sequence_parallel`` and for the base's q/k norms, which see only local heads.
    """
    if getattr(parameter, "sequence_parallel", False):
        return True
    return adapter_of(name) is None and ("q_layernorm" in name or "k_layernorm" in name)


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket: list[Tensor] = []
        for tensor in (t for t in tensors if t.dtype == dtype):
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def _counts(parameter: nn.Parameter) -> bool:
    """Return whether this rank's copy enters the norm; ``shared`` marks the last stage's tied embedding."""
    cut = getattr(parameter, "tensor_model_parallel", False)
    return (cut or parallel.tp_rank() == 0) and not getattr(parameter, "shared", False)


def _tied_embedding(chunks: Sequence[nn.Module]) -> nn.Parameter | None:
    """Return the trainable embedding that the first and the last pipeline stage both hold, if this rank holds it."""
    if parallel.pp_size() == 1 or not (parallel.is_first_stage() or parallel.is_last_stage()):
        return None
    chunk: Any = chunks[0] if parallel.is_first_stage() else chunks[-1]
    if not getattr(chunk, "share_embeddings_and_output_weights", False):
        return None
    weight = chunk.shared_embedding_or_output_weight()
    return weight if weight.requires_grad else None


def _accumulate_in_fp32(parameter: nn.Parameter) -> Any:
    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]

    def move(p: Tensor) -> None:
        p.main_grad.add_(p.grad)  # type: ignore[attr-defined]
        p.grad = None

    return parameter.register_post_accumulate_grad_hook(move)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
