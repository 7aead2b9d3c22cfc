"""Answer-token losses over a vocabulary that is cut over the tensor-parallel ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from graftwork.batch import IGNORED
from graftwork.parallel.state import tp_rank, tp_size

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
"""The sum of a microbatch's answer-token losses, their number, and both again by name."""

LossFunction = Callable[[Tensor], Loss]
"""Reads the loss from a microbatch's output."""


def mask_padded_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Set the logits [..., v/tp] of padding rows to -inf, so that no loss or sample depends on the padding."""
    width = logits.shape[-1]
    real = vocab_size - tp_rank() * width
    if real >= width:
        return logits
    padding = torch.arange(width, device=logits.device) >= real
    return logits.masked_fill(padding, float("-inf"))


def token_losses(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the cross entropy [n], in fp32 or more, of logits [n, v/tp] against real-vocabulary targets [n]."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    logits = mask_padded_vocabulary(logits.to(exact), vocab_size)
    if tp_size() == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    losses: Tensor = vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1))
    return losses.squeeze(1)


def answer_rows(labels: Tensor) -> Tensor:
    """Return the flat indices of the positions that have a target, in [b, s] order."""
    return (labels.reshape(-1) != IGNORED).nonzero().squeeze(1)


def summed_loss(total: Tensor, number: int) -> Loss:
    """Return the sum of a microbatch's ``number`` token losses in the form that megatron-core's schedule takes."""
    count = torch.tensor(number, dtype=torch.int, device=total.device)
    return total, count, {"loss_sum": total.detach().clone(), "num_tokens": count.clone()}
