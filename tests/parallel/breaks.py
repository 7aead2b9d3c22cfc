"""Deliberate mistakes, each of which another library has shipped: the matrix must notice every one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from graftwork import parallel
from graftwork.batch import Batch
from graftwork.core import context_parallel, records, t5
from graftwork.models import GPT
from graftwork.parallel.record import Record, record_of
from graftwork.parallel.sharding import Sharding
from graftwork.peft import cuts
from graftwork.peft.adapter import Adapter
from graftwork.peft.artifact import tensors
from graftwork.peft.methods import dora, lora, prompt_tuning
from graftwork.peft.wrapper import original_weight
from graftwork.training import schedule
from graftwork.training.optimizer import gradients
from graftwork.training.optimizer.bucket import Bucket


@pytest.mark.fault(
    "a replicated LoRA factor's gradient is not summed over tensor-parallel ranks under sequence parallelism",
    "the record on the parameter says that its gradient is partial; the sums read nothing else",
)
def drop_the_sequence_sum() -> None:
    """Leave gradients partial that every tensor-parallel rank has seen a part of the sequence for."""
    gradients.record_of = lambda parameter: replace(record_of(parameter), partial=False)


@pytest.mark.fault(
    "a gradient that is whole on every tensor-parallel rank is summed again",
    "the record on the parameter says that its gradient is whole",
)
def sum_what_is_whole() -> None:
    """Sum every replicated gradient over the tensor-parallel ranks, also those that are whole already."""
    gradients.record_of = lambda parameter: replace(record_of(parameter), partial=not record_of(parameter).cut)


@pytest.mark.fault(
    "an adapter-only save keeps one tensor-parallel rank's part",
    "every tensor is written whole; loading compares each shape with the model's",
)
def save_first_rank_only() -> None:
    """Write the first tensor-parallel rank's parts as if they were the tensors."""

    def whole(parameter: Tensor) -> Record:
        return replace(record_of(parameter), sharding=Sharding(tuple(parameter.shape)))

    tensors.record_of = whole


@pytest.mark.fault(
    "the loss is a mean per microbatch, then a mean of means",
    "sums of losses are divided once, by the answer tokens of the global batch",
)
def mean_per_microbatch() -> None:
    """Average the loss inside each microbatch, then over microbatches."""
    exact = GPT.forward_step

    def forward_step(self: GPT, iterator: Any, module: Any) -> Any:
        output, loss_func = exact(self, iterator, module)

        def mean(output: Tensor) -> Any:
            total, count, logged = loss_func(output)
            factor = 15 / count.clamp(min=1)  # about the answer tokens of a microbatch
            return total * factor, count, {**logged, "loss_sum": (total * factor).detach()}

        return output, mean

    GPT.forward_step = forward_step  # type: ignore[method-assign]


@pytest.mark.fault(
    "the loss is a mean per replica, then a mean of means",
    "the divisor is counted over the global batch",
)
def mean_per_replica() -> None:
    """Average the loss over each replica's own answer tokens, then over replicas."""
    schedule.count_tokens = lambda batch: batch.count_targets() * parallel.dp_size()


@pytest.mark.fault(
    "gradients divided by the whole batch are averaged over replicas again",
    "gradients are summed over replicas; a layout must give one process's gradients",
)
def average_over_replicas() -> None:
    """Average gradients over replicas that have been divided by the whole batch's tokens already."""
    exact = Bucket.wait

    def wait(self: Bucket) -> None:
        exact(self)
        for tensor in self.tensors():
            tensor.div_(self.group.size())

    Bucket.wait = wait  # type: ignore[method-assign]


@pytest.mark.fault(
    "the pipeline stages' copies of a tied embedding keep their own gradients",
    "copies are summed; a layout must give one process's gradients",
)
def forget_tied_copy() -> None:
    """Leave the two pipeline stages' copies of a tied embedding with their own gradients."""
    gradients._tied_embedding = lambda chunks: None


@pytest.mark.fault(
    "a recomputed layer sends its rows by the route of the microbatch that is at work by then",
    "recomputation sees the context variables of its first run; a layout must give one process's gradients",
)
def forget_the_route() -> None:
    """Run layers again outside of the context of their microbatch."""
    keeping = tensor_parallel.checkpoint
    tensor_parallel.checkpoint = next(c.cell_contents for c in keeping.__closure__ if callable(c.cell_contents))


@pytest.mark.fault(
    "DoRA's norms of a row-parallel linear are those of one rank's columns",
    "squares are summed over the ranks; a layout must give one process's logits",
)
def norm_of_own_columns() -> None:
    """Divide magnitudes by the norms of the columns that this rank holds; only births know whole rows."""

    def scale(self: dora.DoRALinear) -> Tensor:
        A, B = self.factors
        alone = cuts.Replicated(self.cut.inputs, self.cut.outputs, cuts.Region())
        return self.magnitude / alone.norm(original_weight(self.base), (B * self.low_rank.scale, A))

    dora.DoRALinear.scale = scale  # type: ignore[method-assign]


@pytest.mark.fault(
    "experts on different ranks train different copies of the LoRA that they share",
    "it belongs to no expert, so that its gradient is summed over all ranks that hold a copy",
)
def copies_per_expert_rank() -> None:
    """Take factors that all experts share for some expert's own."""
    exact = Adapter._record
    lora.SharedFactors._record = lambda self, *args: replace(exact(self, *args), expert=True)  # type: ignore[method-assign]


@pytest.mark.fault(
    "a task's virtual token gets the row of the slot beside it",
    "ids name rows in every layout; a layout must give one process's logits",
)
def task_slot_off_by_one() -> None:
    """Give every virtual token of prompt tuning the row of the slot before it."""
    prompt_tuning.TrainedPrompt.rows = lambda self: self.table.roll(1, 0)  # type: ignore[method-assign]


@pytest.mark.fault(
    "the table of relative positions, one for all tensor-parallel ranks, keeps the gradient of one rank's heads",
    "the record says that its gradient is partial; it is summed over the ranks",
)
def table_of_own_heads() -> None:
    """Take the gradient of the biases of this rank's heads for the whole one."""
    records.OF_HEADS = tuple(part for part in records.OF_HEADS if part != "relative_attention_bias")


@pytest.mark.fault(
    "every tensor-parallel rank biases its heads as the first rank's",
    "each rank looks up its own heads; a layout must give one process's logits",
)
def biases_of_the_first_heads() -> None:
    """Look up the relative positions of the first rank's heads on every rank."""
    t5.tp_rank = lambda: 0


@pytest.mark.fault(
    "a context-parallel rank takes neighbouring chunks of a sample where its attention expects an early and a late one",
    "cut, positions and attention go by one zig-zag; a layout must give one process's losses",
)
def neighbouring_chunks() -> None:
    """Cut every sample into as many parts as there are ranks, in order."""
    context_parallel.row_positions = lambda row, rank, size: torch.cat(
        [s.start + torch.arange(s.length).chunk(size)[rank] for s in row]
    )


@pytest.mark.fault(
    "positions in a pack go on over its samples once it is laid for context parallelism",
    "every token keeps its position wherever it is laid; a layout must give one process's losses",
)
def positions_of_the_row() -> None:
    """Count positions from the start of the row that is laid anew."""
    exact = Batch.rearranged

    def rearranged(self: Batch, source: Tensor, cu_seqlens: Tensor) -> Batch:
        return replace(exact(self, source, cu_seqlens), position_ids=torch.arange(source.shape[1]).expand_as(source))

    Batch.rearranged = rearranged  # type: ignore[method-assign]


@pytest.mark.fault(
    "what makes a sample divisible by the context-parallel ranks is learned from",
    "it has no target; a layout must give one process's losses",
)
def padding_is_learned() -> None:
    """Leave the token that is repeated behind a sample the target that it has there."""
    exact = Batch.rearranged

    def rearranged(self: Batch, source: Tensor, cu_seqlens: Tensor) -> Batch:
        return exact(self, torch.where(source < 0, -1 - source, source), cu_seqlens)

    Batch.rearranged = rearranged  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        drop_the_sequence_sum,
        sum_what_is_whole,
        save_first_rank_only,
        mean_per_microbatch,
        mean_per_replica,
        average_over_replicas,
        forget_tied_copy,
        forget_the_route,
        norm_of_own_columns,
        copies_per_expert_rank,
        table_of_own_heads,
        biases_of_the_first_heads,
        task_slot_off_by_one,
        neighbouring_chunks,
        positions_of_the_row,
        padding_is_learned,
    )
}
