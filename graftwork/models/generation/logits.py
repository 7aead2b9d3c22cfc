"""Whole logits of a model in any layout: through the pipeline, gathered over tensor and context ranks."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from graftwork import parallel
from graftwork.core.segments import local_positions
from graftwork.models.batch import context_slice, positions

if TYPE_CHECKING:
    from graftwork.models.gpt import GPT


def all_logits(model: "GPT", tokens: Tensor) -> Tensor:
    """Return logits [b, s, vocab_size] of right-padded ids [b, s] on every rank.

    Differentiable without pipeline and context parallelism.
    """
    length = tokens.shape[1]
    batch = _batch(tokens, _multiple(model))
    local = _through_pipeline(model, batch) if parallel.pp_size() > 1 else model.run_chunk(model.chunks[0], batch)
    whole = mappings.gather_from_tensor_model_parallel_region(local, group=parallel.tp_group())
    return _gather_context(whole)[:, :length, : model.shape.vocab_size]


def _multiple(model: "GPT") -> int:
    """Sequence lengths must be multiples of this: 2 * context ranks, and tensor ranks under sequence parallelism."""
    context = 2 * parallel.cp_size() if parallel.cp_size() > 1 else 1
    return context * (parallel.tp_size() if model.config.sequence_parallel else 1)


def _batch(tokens: Tensor, multiple: int) -> dict[str, Any]:
    padded = F.pad(tokens, (0, -tokens.shape[1] % multiple))
    return context_slice({"tokens": padded, "position_ids": positions(padded)})


def _through_pipeline(model: "GPT", batch: dict[str, Any]) -> Tensor:
    """Run one microbatch through all stages and return the last stage's logits on each of them."""
    rows, length = batch["tokens"].shape
    outputs: list[Tensor] = []

    def step(iterator: Any, chunk: Any) -> tuple[Tensor, Any]:
        def keep(output: Tensor, non_loss_data: bool = False) -> Tensor:
            outputs.append(output)
            return output

        return model.run_chunk(chunk, next(iterator)), keep

    single = len(model.chunks) == 1
    count = 1 if single else parallel.pp_size()  # interleaving refuses fewer microbatches than stages: repeat this one
    iterators = [iter([batch] * count) for _ in model.chunks]
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators[0] if single else iterators,
        model=model.chunks[0] if single else model.chunks,
        num_microbatches=count,
        seq_length=length * parallel.cp_size(),
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    width = model.shape.padded_vocab_size(parallel.tp_size()) // parallel.tp_size()
    last = dist.get_process_group_ranks(parallel.pp_group())[-1]
    logits = outputs[0] if outputs else torch.empty(rows, length, width, dtype=model.config.params_dtype)
    logits = logits.contiguous().to(batch["tokens"].device)
    dist.broadcast(logits, last, group=parallel.pp_group())
    return logits


def _gather_context(logits: Tensor) -> Tensor:
    size = parallel.cp_size()
    if size == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits.detach().contiguous(), group=parallel.cp_group())
    length = logits.shape[1] * size
    order = torch.cat([local_positions(length, rank, size) for rank in range(size)])
    return torch.cat(parts, dim=1)[:, torch.argsort(order).to(logits.device)]
