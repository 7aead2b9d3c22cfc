"""A decoder's keys and values beside what the encoder has said of each prompt."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor

from graftwork.batch import Ids
from graftwork.core.t5 import DecoderCache, RelativeT5
from graftwork.models.generation.logits import gather_vocabulary
from graftwork.models.generation.protocol import CausalModel
from graftwork.models.generation.scoring import device_of


class EncodedCache:
    """Encodes ``prompts`` once, at the first read, and reads the decoder's rows column by column; one piece only.

    A row is a start token and the answer. Whatever routes rows to adapters acts on the encoder as on the decoder. Use
    as a context manager.
    """

    def __init__(self, model: CausalModel, prompts: Ids, length: int) -> None:
        laid, chunk = model.lay_out(prompts, [[0]] * len(prompts), device_of(model)), model.chunks[0]
        assert isinstance(chunk, RelativeT5) and laid.source is not None and laid.source_lengths is not None
        self.vocab_size, self.device = model.shape.vocab_size, device_of(model)
        self.cache = DecoderCache(chunk, laid.source, laid.source_lengths, length)
        self._open = ExitStack()

    def __enter__(self) -> "EncodedCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, rows: list[list[int]]) -> Tensor:
        """Read what is new in ``rows`` (ids, all of one length) and return fp32 logits [b, vocab_size] after it."""
        if not self.cache.length:
            self._open.enter_context(self.cache)
        new = [row[self.cache.length :] for row in rows]
        logits = gather_vocabulary(self.cache.read(torch.tensor(new, dtype=torch.int64, device=self.device)))
        return logits[:, : self.vocab_size].float()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; a row named twice is held twice from here on."""
        self.cache.keep(rows)
