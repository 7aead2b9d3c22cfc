"""How rows that advance together are read, of a causal model and of one with an encoder, cached and not."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from graftwork.batch import Ids
from graftwork.models.generation.encoded import EncodedCache
from graftwork.models.generation.kv_cache import KVCache
from graftwork.models.generation.protocol import CausalModel
from graftwork.models.generation.scoring import last_logits


class Reader(Protocol):
    """What tells the next token of rows that advance together: from a cache, or by reading every row again.

    A row is what stands before the next token in one sequence: the prompt and its answer so far, or what a decoder has
    read, its start token and the answer; see ``heads``.
    """

    def read(self, rows: list[list[int]]) -> Tensor:
        """Return fp32 logits [b, vocab_size] after ``rows``, which are all of one length."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, in this order; a row named twice is held twice from here on."""
        ...


def heads(model: CausalModel, prompts: Ids) -> list[list[int]]:
    """Return what a row of each prompt holds before its answer: the prompt itself, or a decoder's start token."""
    if not model.seq2seq:
        return [list(prompt) for prompt in prompts]
    starts: list[list[int]] = model.lay_out(prompts, [[0]] * len(prompts), torch.device("cpu")).tokens.tolist()
    return starts


def reader(model: CausalModel, prompts: Ids, room: int, cached: bool) -> AbstractContextManager[Reader]:
    """Return what reads rows of ``prompts``, each of at most ``room`` tokens; a cache needs the model in one piece."""
    if not cached:
        return nullcontext(_WholeRows(model, prompts))
    if model.seq2seq:
        return EncodedCache(model, prompts, room)
    return KVCache(model, len(prompts), room)


class _WholeRows:
    """Reads every row from its beginning each time: slow, and right in any parallel layout."""

    def __init__(self, model: CausalModel, prompts: Ids) -> None:
        self.model, self.prompts = model, list(prompts)

    def read(self, rows: list[list[int]]) -> Tensor:
        if self.model.seq2seq:
            return last_logits(self.model, self.prompts, [row[1:] for row in rows])
        return last_logits(self.model, rows, [[]] * len(rows))

    def keep(self, rows: Sequence[int]) -> None:
        self.prompts = [self.prompts[row] for row in rows]
