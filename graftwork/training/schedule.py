"""One optimizer step's batch through megatron-core's forward-backward schedule: microbatches in, loss sum out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import graftwork.compat  # noqa: F401  (accommodations must precede any megatron import)
from graftwork import parallel
from graftwork.errors import ParallelismError

IGNORED = -100
ForwardStep = Callable[[Iterator[dict[str, Any]], nn.Module], tuple[Tensor, Callable[..., Any]]]


@dataclass
class StepLoss:
    """Loss of one batch over the whole world, equal on every rank.

    loss_sum: sum of the answer tokens' losses; tokens: their number; microbatches: this rank's loss sums, one for
    each of its microbatches (empty except on the last pipeline stage).
    """

    loss_sum: Tensor
    tokens: Tensor
    microbatches: list[Tensor] = field(default_factory=list)

    @property
    def mean(self) -> Tensor:
        """Mean loss of an answer token, fp32; 0 for a batch without answer tokens."""
        return (self.loss_sum / self.tokens.clamp(min=1)).float()


def run_schedule(
    forward_step: ForwardStep, chunks: Sequence[nn.Module], batch: dict[str, Any], forward_only: bool
) -> StepLoss:
    """Run ``batch`` (all rows of one step of this data-parallel rank) forward, and backward unless ``forward_only``.

    Gradients are those of the loss *sum* of this rank's rows: nothing divides them yet.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    parts = microbatches(batch)
    tokens = count_tokens(batch)
    rows, length = parts[0]["tokens"].shape
    if batch.get("packed"):  # the model lays a microbatch's packed rows in one line
        rows, length = 1, rows * length
    iterators = [iter(parts) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(parts),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    sums = [output["loss_sum"] for output in outputs]
    return StepLoss(_loss_sum(sums, tokens.device), tokens, sums)


def microbatches(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Cut every tensor of ``batch`` along its rows into parts of ``micro_batch_size``; other values are shared."""
    rows = batch["tokens"].shape[0]
    size = int(batch.get("micro_batch_size", rows))
    if rows % size:
        raise ParallelismError(
            f"a step of {rows} rows on a data-parallel rank cannot be cut into microbatches of "
            f"micro_batch_size={size}: make global_batch_size a multiple of micro_batch_size x data-parallel ranks."
        )
    starts = range(0, rows, size)
    return [{k: v[i : i + size] if isinstance(v, Tensor) else v for k, v in batch.items()} for i in starts]


def count_tokens(batch: dict[str, Any]) -> Tensor:
    """Return the number of answer tokens in the whole global batch, int64."""
    # Every rank holds whole rows here (context-parallel ranks cut them later), so only data-parallel ranks add up.
    tokens = (batch["labels"] != IGNORED).sum()
    if parallel.dp_size() > 1:
        dist.all_reduce(tokens, group=parallel.dp_group())
    return tokens


def _loss_sum(sums: list[Tensor], device: torch.device) -> Tensor:
    """Add up microbatches, data- and context-parallel ranks, and hand the last stage's sum to every stage."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in sums:
        total += part.double()
    group = parallel.dp_group(with_context_parallel=True)
    if parallel.is_last_stage() and group.size() > 1:
        dist.all_reduce(total, group=group)
    stages = parallel.pp_group()
    if stages.size() > 1:
        dist.broadcast(total, dist.get_process_group_ranks(stages)[-1], group=stages)
    return total
