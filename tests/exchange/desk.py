"""One random checkpoint seen from both sides: our model, and transformers' with Hugging Face PEFT around it."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from graftwork import models
from graftwork.models.base import Model
from graftwork.peft import PEFT
from tests.contracts.methods import prompted, shake
from tests.helpers import tiny_hf, tiny_t5
from tests.peft.hf_lora import tokens

SLOW = ("qwen2", "qwen3", "mistral", "nemotron", "llama_bias", "phi3", "t5", "mt5")
EVERY = ("llama", "gpt2", "t5v11", *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW))
"""The families that tests are parametrized over."""
CLOSE = 1e-5
"""Largest difference of logits, relative to the largest."""
T5_CLOSE = 2e-5
"""That of T5's base: queries and keys are not scaled, which makes roundings grow."""


class Desk:
    """A checkpoint of one family; ``ours`` is built once, its adapters come and go."""

    def __init__(self, family: str, directory: Path) -> None:
        self.family, self.directory = family, directory
        self.seq2seq = family in tiny_t5.KINDS
        kind = tiny_t5 if self.seq2seq else tiny_hf
        (tiny_t5.make_t5 if self.seq2seq else tiny_hf.make_tiny)(family, directory)
        self.ours: Model = models.load(directory)
        self.base = kind.oracle(directory)
        self.close = T5_CLOSE if self.seq2seq else CLOSE

    def clear(self) -> Model:
        """Return our model without adapters."""
        for name in list(self.ours.adapters):
            self.ours.delete_adapter(name)
        return self.ours

    def grafted(self, *transforms: PEFT) -> Model:
        """Return our model with these, every value moved by noise."""
        model = self.clear()
        model.add_adapter(list(transforms))
        shake(model, 0.05)
        model.eval()
        return model

    def logits(self, model: Any) -> Tensor:
        """Return the logits of our model, or of one of theirs."""
        with torch.no_grad():
            if self.seq2seq:
                source, target = tiny_t5.ids()
                if isinstance(model, Model):
                    return model(prompted(model, source), target)
                return model(input_ids=source, decoder_input_ids=target).logits
            return model(prompted(model, tokens())) if isinstance(model, Model) else model(tokens()).logits

    def oracle(self) -> nn.Module:
        """Return a copy of transformers' model of the bare base."""
        return deepcopy(self.base)

    def theirs(self, directory: Path) -> nn.Module:
        """Return transformers' model with the adapter in a directory."""
        return peft.PeftModel.from_pretrained(deepcopy(self.base), directory).eval()

    def made(self, config: peft.PeftConfig, directory: Path, scale: float = 0.05) -> nn.Module:
        """Return their model with a new adapter whose every value is moved by noise, saved to a directory."""
        model = peft.get_peft_model(deepcopy(self.base), config).eval()
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(directory)
        return model

    def same(self, found: Tensor, wanted: Tensor) -> bool:
        """Tell whether logits are equal but for roundings, and not those of the bare base."""
        assert found.shape == wanted.shape
        return bool((found - wanted).abs().max() <= self.close * wanted.abs().max())

    def changes(self, logits: Tensor) -> bool:
        """Tell whether logits of the given positions are clearly others than the base's."""
        bare = self.logits(self.base)
        return bool((logits[:, -bare.shape[1] :] - bare).abs().max() > 1e-2 * bare.abs().max())


def factors(model: Model, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Return every trained value by site and tensor, without the adapter's name."""
    chosen = list(model.adapters) if names is None else names
    return {t.key.partition(".")[2]: t.value.clone() for name in chosen for t in model.stack.tensors(name)}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two sets of tensors are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
