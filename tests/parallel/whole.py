"""Full tensors under global names from this rank's parts, so that every layout speaks of the same tensors."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftwork import parallel
from graftwork.parallel.collective import all_gather_objects
from graftwork.parallel.record import record_of
from tests.helpers.tiny_gpt import cut
from tests.parallel.models import key_of


def whole(model: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Return copies of every trainable parameter of this rank's stages, or of its gradient; collective over TP."""
    found = {}
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                value = _gradient(model, parameter) if gradients else parameter.detach()
                found[key_of(chunk, name, parameter)] = _joined(chunk, name, parameter, value, model.shape.vocab_size)
    return found


def _gradient(model: Any, parameter: nn.Parameter) -> Tensor:
    """Return a gradient as ``.grad`` has it, or from the pieces of all ranks that share the parameter out."""
    if parameter.grad is not None:
        return parameter.grad
    expert = record_of(parameter).expert
    group = parallel.expert_dp_group() if expert else parallel.dp_group(with_context_parallel=True)
    held = all_gather_objects(model.trainer.strategy.update.gradient_of(parameter), group)
    return torch.cat([piece for pieces in held for piece in pieces]).view_as(parameter)


def _joined(chunk: nn.Module, name: str, parameter: Tensor, local: Tensor, vocabulary: int) -> Tensor:
    record = record_of(parameter)
    own = None if record.owner is None else record.sharding
    sharding = own if own is not None else cut(chunk, name, parameter)
    size = parallel.tp_size() if sharding.dim is not None else 1
    parts = [local.contiguous()]
    if size > 1:
        parts = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(parts, local.contiguous(), group=parallel.tp_group())
    full = sharding.join(parts)
    is_vocabulary = own is None and ("word_embeddings" in name or "output_layer" in name)
    return (full[:vocabulary] if is_vocabulary else full).clone()
