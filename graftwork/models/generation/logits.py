"""Whole logits of a model in any layout: through the pipeline, gathered over tensor and context ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from graftwork import parallel
from graftwork.batch import Batch
from graftwork.core.context_parallel import slice_batch
from graftwork.core.segments import local_positions
from graftwork.errors import ConfigError
from graftwork.models.generation.protocol import CausalModel


@dataclass(frozen=True)
class RightPadded:
    """Rows with their padding moved to the right, where causal attention never sees it, and the way back."""

    tokens: Tensor
    places: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None) -> "RightPadded":
        """Move the padding of [b, s] ids (mask 0) behind the tokens; padding becomes id 0."""
        if attention_mask is None or bool(attention_mask.all()):
            return cls(input_ids, None, None)
        mask = attention_mask.bool()
        starts = mask.clone()
        starts[:, 1:] &= ~mask[:, :-1]
        if bool((starts.sum(dim=1) > 1).any()):
            row = int((starts.sum(dim=1) > 1).nonzero()[0])
            raise ConfigError(
                f"attention_mask has a hole in row {row}: padding (0) may stand before and after a row's tokens, "
                "not between them."
            )
        order = torch.argsort((~mask).int(), dim=1, stable=True)
        tokens = torch.gather(input_ids.masked_fill(~mask, 0), 1, order)
        return cls(tokens, torch.argsort(order, dim=1), mask)

    def restore(self, logits: Tensor) -> Tensor:
        """Bring logits [b, s, v] back to the places of ``input_ids``; padding gets zeros."""
        if self.places is None or self.mask is None:
            return logits
        index = self.places.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        return torch.gather(logits, 1, index) * self.mask.unsqueeze(-1)


def masked_logits(model: CausalModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return logits [b, s, vocab_size] of ids [b, s] whose mask [b, s] is 0 on padding, on whichever side it is.

    Positions count from each row's first token; logits at padding are zero.
    """
    rows = RightPadded.of(input_ids, attention_mask)
    return rows.restore(all_logits(model, Batch.of(rows.tokens)))


def all_logits(model: CausalModel, batch: Batch) -> Tensor:
    """Return logits [b, s, vocab_size] of right-padded rows [b, s] on every rank.

    Differentiable without pipeline and context parallelism.
    """
    length = batch.tokens.shape[1]
    batch = slice_batch(batch.in_multiples_of(_multiple(model)))
    local = _through_pipeline(model, batch) if parallel.pp_size() > 1 else model.run_chunk(model.chunks[0], batch)
    return _gather_context(gather_vocabulary(local))[:, :length, : model.shape.vocab_size]


def gather_vocabulary(logits: Tensor) -> Tensor:
    """Return logits [..., v] on every tensor-parallel rank from each one's part [..., v/tp]; differentiable."""
    whole: Tensor = mappings.gather_from_tensor_model_parallel_region(logits, group=parallel.tp_group())
    return whole


def _multiple(model: CausalModel) -> int:
    """Sequence lengths must be multiples of this: 2 * context ranks, and tensor ranks under sequence parallelism."""
    context = 2 * parallel.cp_size() if parallel.cp_size() > 1 else 1
    return context * (parallel.tp_size() if model.config.sequence_parallel else 1)


def _through_pipeline(model: CausalModel, batch: Batch) -> Tensor:
    """Run one microbatch through all stages and return the last stage's logits on each of them."""
    outputs = _outputs(model, batch)
    (rows, length), device = batch.tokens.shape, batch.tokens.device
    width = model.shape.padded_vocab_size(parallel.tp_size()) // parallel.tp_size()
    last = dist.get_process_group_ranks(parallel.pp_group())[-1]
    logits = outputs[0] if outputs else torch.empty(rows, length, width, dtype=model.config.params_dtype)
    logits = logits.contiguous().to(device)
    dist.broadcast(logits, last, group=parallel.pp_group())
    return logits


def _outputs(model: CausalModel, batch: Batch) -> list[Tensor]:
    """Return the logits [b, s, v/tp] that come out on the last stage; none on the others."""
    outputs: list[Tensor] = []

    def step(iterator: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, object]:
        def keep(output: Tensor, non_loss_data: bool = False) -> Tensor:
            outputs.append(output)
            return output

        return model.run_chunk(chunk, next(iterator)), keep

    single = len(model.chunks) == 1
    count = 1 if single else parallel.pp_size()  # interleaving refuses fewer microbatches than stages: repeat this one
    iterators = [iter([batch] * count) for _ in model.chunks]
    rows, length = batch.tokens.shape
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
    return outputs


def _gather_context(logits: Tensor) -> Tensor:
    """Put the context-parallel ranks' zig-zag parts [b, s/cp, v] back into the order of the sequence."""
    size = parallel.cp_size()
    if size == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits.detach().contiguous(), group=parallel.cp_group())
    length = logits.shape[1] * size
    order = torch.cat([local_positions(length, rank, size) for rank in range(size)])
    return torch.cat(parts, dim=1)[:, torch.argsort(order).to(logits.device)]
