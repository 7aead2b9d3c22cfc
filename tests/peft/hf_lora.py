"""Hugging Face PEFT beside our low-rank methods on the same random checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork import models
from graftwork.models import GPT
from graftwork.peft import PEFT
from tests.contracts.methods import shake
from tests.helpers.tiny_hf import ODD_VOCABULARY, make_tiny, oracle
from tests.peft.hf_names import modules

TOLERANCE = 1e-5
"""Largest difference, relative to the largest absolute value."""
LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
}
Pair = tuple[Any, Any, Tensor]
"""Our adapter of a site, one of their LoRA layers of it, its rows of our fused linear."""


def tokens(seed: int = 5) -> Tensor:
    """Return ids of the tiny checkpoints' vocabulary."""
    return torch.randint(ODD_VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(seed))


def loss(logits: Tensor, seed: int = 5) -> Tensor:
    """Return the mean loss of the next tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens(seed)[:, 1:].flatten())


def assert_close(found: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Compare relative to the largest value."""
    assert found.shape == wanted.shape, what
    found, wanted = found.detach(), wanted.detach()
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), what


def both(family: str, directory: Path, transform: PEFT, **options: Any) -> tuple[GPT, nn.Module]:
    """Return (our model with a shaken adapter, theirs with a fresh one)."""
    make_tiny(family, directory)
    ours, gpt2 = models.load(directory), family.startswith("gpt2")
    ours.add_adapter(transform)
    shake(ours, 0.05)
    targets = options.pop("target_modules", LINEARS["gpt2" if gpt2 else "llama"])
    config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, fan_in_fan_out=gpt2, **options)
    return ours, peft.get_peft_model(oracle(directory), config).eval()


def pairs(ours: GPT, theirs: nn.Module, name: str) -> Iterator[Pair]:
    """Yield what stands at the same place in both models."""
    base = theirs.base_model.model
    for item in ours.stack.grafted[name]:
        for path, rows in modules(ours.shape, item.site.name):
            layer = base.get_submodule(path)
            if hasattr(layer, "lora_A"):
                yield item.adapter, layer, rows
