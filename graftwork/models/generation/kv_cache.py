"""Keys and values of what was read already, for rows that advance together."""

from types import TracebackType

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftwork.models.generation.protocol import CausalModel
from graftwork.models.generation.scoring import device_of


class KVCache:
    """Reads rows column by column through megatron-core's static inference context; one piece only.

    All rows stand at the same position, so there is no padding and positions are exact. Use as a context manager.
    """

    def __init__(self, model: CausalModel, rows: int, length: int) -> None:
        self.chunk = model.chunks[0]
        self.vocab_size, self.device = model.shape.vocab_size, device_of(model)
        self.context = StaticInferenceContext(rows, length)
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> "KVCache":
        # megatron-core 0.19 computes the logits of every position when its own engine is not running.
        self._hook = self.chunk.get_submodule("decoder").register_forward_hook(_last_position)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hook is not None:
            self._hook.remove()

    def read(self, rows: list[list[int]]) -> Tensor:
        """Read what is new in ``rows`` (ids, all of one length) and return fp32 logits [b, vocab_size] after it."""
        start = self.context.sequence_len_offset
        tokens = torch.tensor([row[start:] for row in rows], dtype=torch.int64, device=self.device)
        stop = start + tokens.shape[1]
        logits: Tensor = self.chunk(
            input_ids=tokens,
            position_ids=torch.arange(start, stop, device=self.device).expand_as(tokens),
            attention_mask=None,
            inference_context=self.context,
            runtime_gather_output=True,
        )
        self.context.sequence_len_offset = stop
        return logits[:, -1, : self.vocab_size].float()

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, in this order; a row named twice is held twice from here on."""
        chosen = torch.tensor(rows, device=self.device)
        memory = self.context.key_value_memory_dict
        for layer, held in memory.items():
            memory[layer] = tuple(tensor.index_select(1, chosen) for tensor in held)


def _last_position(decoder: nn.Module, arguments: object, hidden: Tensor) -> Tensor:
    return hidden[-1:]
