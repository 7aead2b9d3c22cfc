"""One optimizer step's batch through megatron-core's forward-backward schedule: microbatches in, loss sum out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftwork import parallel
from graftwork.batch import Batch
from graftwork.core.context_parallel import cuttable
from graftwork.models.loss import LossFunction

ForwardStep: TypeAlias = Callable[[Iterator[Batch], nn.Module], tuple[Tensor, LossFunction]]
"""Takes the next microbatch; returns a chunk's output and the function that reads its loss."""


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


def run_schedule(forward_step: ForwardStep, chunks: Sequence[nn.Module], batch: Batch, forward_only: bool) -> StepLoss:
    """Run ``batch`` (all rows of one step of this data-parallel rank) forward, and backward unless ``forward_only``.

    Gradients are those of the loss *sum* of this rank's rows: nothing divides them yet.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batch = cuttable(batch)
    parts = batch.microbatches()
    tokens = count_tokens(batch)
    rows, length = parts[0].sequence_shape
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


def count_tokens(batch: Batch) -> Tensor:
    """Return the number of answer tokens in the whole global batch, int64."""
    # Every rank holds whole rows here (context-parallel ranks cut them later), so only data-parallel ranks add up.
    tokens = batch.count_targets()
    if parallel.dp_size() > 1:
        dist.all_reduce(tokens, group=parallel.dp_group())
    return tokens


def _loss_sum(sums: Sequence[Tensor], device: torch.device) -> Tensor:
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
