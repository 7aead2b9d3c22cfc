"""What the data need from outside: tokenizer, prompt layout, this process's place among the ranks."""

from collections.abc import Mapping
from typing import NamedTuple, Optional, Protocol, runtime_checkable

import lightning.pytorch as pl

from graftwork.data.tokenizer import Tokenizer, check_same_words, load_tokenizer
from graftwork.errors import CheckpointError, ConfigError
from graftwork.virtual_tokens import PromptLayout


@runtime_checkable
class HasTokenizer(Protocol):
    """A model with a tokenizer of its own."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None where the model has none after all."""


@runtime_checkable
class HasShape(Protocol):
    """A model that knows its sizes."""

    @property
    def shape(self) -> object:
        """The sizes."""


@runtime_checkable
class HasVocabulary(Protocol):
    """Sizes with that of the vocabulary, without padding."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""


@runtime_checkable
class SaysKind(Protocol):
    """A model that says whether an encoder reads its prompts."""

    seq2seq: bool


@runtime_checkable
class HasDecoderStart(Protocol):
    """Sizes of a sequence-to-sequence model."""

    @property
    def decoder_start_token_id(self) -> int:
        """What the decoder reads first."""


@runtime_checkable
class HasPrompts(Protocol):
    """A model with virtual tokens."""

    @property
    def prompt_layout(self) -> PromptLayout:
        """The virtual tokens of the adapters that are attached now."""


@runtime_checkable
class DealsRows(Protocol):
    """A strategy of several processes, as Lightning's parallel ones are."""

    @property
    def distributed_sampler_kwargs(self) -> Mapping[str, int]:
        """``rank`` among the ``num_replicas`` that read rows of their own."""


@runtime_checkable
class PadsRows(Protocol):
    """A strategy that cuts sequences over ranks."""

    @property
    def pad_to_multiple(self) -> int:
        """What a row's length must be a multiple of."""


@runtime_checkable
class HasAdapters(Protocol):
    """A model with adapters."""

    @property
    def adapters(self) -> Mapping[str, object]:
        """The adapters that are attached now, by name."""


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
        self.trainer: pl.Trainer | None = None
        self.attached_tokenizer: Tokenizer | None = None
        self.attached_layout: PromptLayout | None = None
        self.attached_topology: Topology | None = None
        self.attached_start: int | None = None
        self._loaded: Tokenizer | None = None
        self._compared = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The Hugging Face tokenizer; raises ConfigError where there is none."""
        if self.attached_tokenizer is not None:
            return self.attached_tokenizer
        if self.path is not None:
            return self.beside(self._model_tokenizer)
        model = self._model
        if not isinstance(model, HasTokenizer) or model.tokenizer is None:
            raise ConfigError("the data need a tokenizer: set tokenizer='<directory>' or use a model that has one.")
        return model.tokenizer

    def beside(self, model_own: Tokenizer | None) -> Tokenizer:
        """The tokenizer of the path, which must agree with a model's own; that one where there is no path."""
        if self.path is None:
            assert model_own is not None, "a model that is asked has a tokenizer"
            return model_own
        self._loaded = self._loaded or load_tokenizer(self.path)
        if model_own is not None and not self._compared:
            check_same_words(self._loaded, model_own, self.path)
            self._compared = True
        return self._loaded

    @property
    def vocabulary(self) -> int | None:
        """How many ids the model has, None where there is no model that says so."""
        shape = self._model.shape if isinstance(self._model, HasShape) else None
        return shape.vocab_size if isinstance(shape, HasVocabulary) else None

    @property
    def kind_is_known(self) -> bool:
        """Whether there is a model, or a hand that says what kind it is."""
        return self.attached_start is not None or self._model is not None

    @property
    def decoder_start(self) -> int | None:
        """What the decoder of a sequence-to-sequence model reads first; None: the model is causal, or there is none."""
        if self.attached_start is not None:
            return self.attached_start
        model = self._model
        if not isinstance(model, SaysKind) or not model.seq2seq:
            return None
        shape = model.shape if isinstance(model, HasShape) else None
        assert isinstance(shape, HasDecoderStart), "a model with a decoder knows what it begins with"
        return shape.decoder_start_token_id

    @property
    def layout(self) -> PromptLayout:
        """The virtual tokens of the adapters that are attached to the model now."""
        if self.attached_layout is not None:
            return self.attached_layout
        model = self._model
        return model.prompt_layout if isinstance(model, HasPrompts) else PromptLayout()

    @property
    def adapters(self) -> list[str] | None:
        """Names of the adapters that are attached to the model now, None where there is no model."""
        return list(self._model.adapters) if isinstance(self._model, HasAdapters) else None

    @property
    def topology(self) -> Topology:
        """Data-parallel place by the trainer's strategy (a strategy without one runs a single process)."""
        if self.trainer is None:
            return self.attached_topology or Topology()
        strategy = self.trainer.strategy
        dealt = strategy.distributed_sampler_kwargs if isinstance(strategy, DealsRows) else {}
        multiple = strategy.pad_to_multiple if isinstance(strategy, PadsRows) else 1
        return Topology(dealt.get("rank", 0), dealt.get("num_replicas", 1), multiple)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.trainer.is_global_zero if self.trainer is not None else self.topology.rank == 0

    @property
    def _model_tokenizer(self) -> Tokenizer | None:
        try:
            return self._model.tokenizer if isinstance(self._model, HasTokenizer) else None
        except (ConfigError, CheckpointError):  # random weights, or a checkpoint without one
            return None

    @property
    def _model(self) -> pl.LightningModule | None:
        # Trainer.lightning_module lives on the strategy and is None until a loop starts.
        return self.trainer.lightning_module if self.trainer is not None else None
