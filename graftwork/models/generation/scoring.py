"""Logits at chosen positions only, in any layout: the base of generation and evaluation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from graftwork import parallel
from graftwork.batch import Batch, Ids
from graftwork.errors import ConfigError
from graftwork.models.generation.logits import all_logits, gather_vocabulary
from graftwork.models.generation.protocol import CausalModel
from graftwork.models.loss import answer_rows
from graftwork.virtual_tokens import VIRTUAL_BASE


@contextmanager
def evaluating(model: CausalModel) -> Iterator[None]:
    """Switch dropout and gradients off inside the block; on exit every submodule is in the mode it was in.

    ``torch.inference_mode`` is not used: megatron-core keeps rotary tables, and training could not use them later.
    """
    model.configure_model()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def one_piece(model: CausalModel) -> bool:
    """Tell whether each rank sees whole sequences and all layers (tensor parallelism or a single process)."""
    return parallel.pp_size() == 1 and parallel.cp_size() == 1 and not model.config.sequence_parallel


def device_of(model: CausalModel) -> torch.device:
    """Return where the model's tokens have to be."""
    return next(model.chunks[0].parameters()).device


def target_logits(model: CausalModel, batch: Batch) -> Tensor:
    """Return fp32 logits [n, vocab_size], equal on every model-parallel rank, of the n positions with a target.

    In one piece only those positions reach the output layer.
    """
    if not one_piece(model):
        whole = all_logits(model, batch)
        return whole.reshape(-1, whole.shape[-1])[answer_rows(batch.labels)].float()
    # Over a large vocabulary the logits of all the other positions would cost more than the layers.
    return gather_vocabulary(model.target_logits(batch))[:, : model.shape.vocab_size].float()


def last_logits(model: CausalModel, prompts: Ids, answers: Ids) -> Tensor:
    """Return fp32 logits [b, vocab_size] of the token that follows each prompt and the part of its answer given."""
    batch = model.lay_out(prompts, [[*answer, 0] for answer in answers], device_of(model))
    last = [place == len(answer) for answer in answers for place in range(len(answer) + 1)]
    return target_logits(model, batch.learning(last))


def check_tokens(model: CausalModel, rows: Sequence[Sequence[int]], room: int = 0) -> None:
    """Raise ConfigError for an empty row, an id the model does not have, or a row too long for ``room`` more tokens."""
    limit, vocabulary = model.shape.max_position_embeddings, model.shape.vocab_size
    virtual = VIRTUAL_BASE + model.prompt_layout.size
    for number, row in enumerate(rows):
        if not len(row):
            raise ConfigError(f"Prompt {number} is empty; generation needs at least one token to continue.")
        _check_ids(number, row, vocabulary, virtual)
        if len(row) + room > limit:
            left = limit - len(row)
            raise ConfigError(
                f"Prompt {number} has {len(row)} tokens and asks for {room} more, but the model's context is {limit} "
                f"tokens; {f'ask for at most {left} new tokens' if left > 0 else f'keep fewer than {limit} of it'}."
            )


def _check_ids(number: int, row: Sequence[int], vocabulary: int, virtual: int) -> None:
    for token in row:
        if not (0 <= token < vocabulary or VIRTUAL_BASE <= token < virtual):
            extra = f", or {VIRTUAL_BASE} to {virtual - 1} (virtual)" if virtual > VIRTUAL_BASE else ""
            raise ConfigError(f"Prompt {number} holds the token id {token}; valid: 0 to {vocabulary - 1}{extra}.")
