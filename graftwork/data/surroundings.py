"""What the data need from outside: tokenizer, prompt layout, this process's place among the ranks."""

from typing import Any, NamedTuple, Optional

from graftwork.data.tokenizer import load_tokenizer
from graftwork.errors import ConfigError
from graftwork.virtual_tokens import PromptLayout


class Topology(NamedTuple):
    """Data-parallel rank and size; ``multiple`` divides every sequence length (sequence or context parallelism)."""

    rank: int = 0
    world_size: int = 1
    multiple: int = 1


class Surroundings:
    """Asks, in this order: what was attached by hand, the tokenizer's path, the trainer's model.

    The place among the ranks is always the trainer's where there is one: a hand-made one would deal rows twice.
    """

    def __init__(self, tokenizer: Optional[str]) -> None:
        self.path = tokenizer
        self.trainer: Any = None
        self.attached_tokenizer: Any = None
        self.attached_layout: Optional[PromptLayout] = None
        self.attached_topology: Optional[Topology] = None
        self._loaded: Any = None

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; raises ConfigError where there is none."""
        if self.attached_tokenizer is not None:
            return self.attached_tokenizer
        if self.path is not None:
            self._loaded = self._loaded or load_tokenizer(self.path)
            return self._loaded
        found = getattr(self._module, "tokenizer", None)
        if found is None:
            raise ConfigError("the data need a tokenizer: set tokenizer='<directory>' or use a model that has one.")
        return found

    @property
    def layout(self) -> PromptLayout:
        """The virtual tokens of the adapters that are attached to the model now."""
        if self.attached_layout is not None:
            return self.attached_layout
        return getattr(self._module, "prompt_layout", None) or PromptLayout()

    @property
    def topology(self) -> Topology:
        """Data-parallel place by the trainer's strategy (a strategy without one runs a single process)."""
        if self.trainer is None:
            return self.attached_topology or Topology()
        strategy = getattr(self.trainer, "strategy", None)
        dealt = getattr(strategy, "distributed_sampler_kwargs", None) or {}
        return Topology(
            dealt.get("rank", 0), dealt.get("num_replicas", 1), int(getattr(strategy, "pad_to_multiple", 1))
        )

    @property
    def _module(self) -> Any:
        # Trainer.lightning_module lives on the strategy and is None until a loop starts.
        return getattr(self.trainer, "lightning_module", None)
