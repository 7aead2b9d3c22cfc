"""What generation and scoring ask of a causal model; they know no model class."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from graftwork.batch import Batch, Ids
from graftwork.data.tokenizer import Tokenizer
from graftwork.peft import PEFT
from graftwork.routes import Routes
from graftwork.virtual_tokens import PromptLayout


class Sizes(Protocol):
    """The numbers of a model's shape that decide which tokens it reads and how wide its logits are."""

    @property
    def vocab_size(self) -> int:
        """Number of real token ids."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence, in tokens."""
        ...

    def padded_vocab_size(self, tensor_parallel: int = 1) -> int:
        """Return the number of logits over all tensor-parallel ranks, padding included."""
        ...


class CausalModel(Protocol):
    """A model that tells the next token from those before, in any parallel layout."""

    @property
    def shape(self) -> Sizes:
        """Its sizes."""
        ...

    @property
    def seq2seq(self) -> bool:
        """Whether an encoder reads the prompt and a decoder gives the answer."""
        ...

    @property
    def chunks(self) -> list[nn.Module]:
        """This rank's megatron-core modules."""
        ...

    @property
    def config(self) -> TransformerConfig:
        """megatron-core's configuration."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; raises ConfigError where there is none."""
        ...

    @property
    def prompt_layout(self) -> PromptLayout:
        """Virtual tokens of the attached prompt adapters."""
        ...

    @property
    def adapters(self) -> Mapping[str, PEFT]:
        """Attached transforms by name."""
        ...

    def routed(self, routes: Routes | None) -> AbstractContextManager[None]:
        """Send rows to adapters by ``routes`` inside the block; None: as outside of it."""
        ...

    def configure_model(self) -> None:
        """Build the model unless that is done."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Yield every module."""
        ...

    def eval(self) -> object:
        """Switch dropout off."""
        ...

    def lay_out(self, prompts: Ids, answers: Ids, device: torch.device) -> Batch:
        """Return how prompts, each with the tokens that follow it, reach the model, with targets on those tokens."""
        ...

    def run_chunk(self, chunk: nn.Module, batch: Batch) -> Tensor:
        """Call one chunk on a microbatch: logits [b, s, v/tp], or hidden states before the last stage."""
        ...

    def target_logits(self, batch: Batch) -> Tensor:
        """Return this tensor-parallel rank's logits [n, v/tp] at the n positions with a target."""
        ...
