"""What vLLM serves: plain LoRA of one rank that it knows, with one scale for all modules."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.models.exchange.lazy import Lazy
from graftwork.models.exchange.low_rank import Pair, scale_of
from graftwork.models.exchange.places import Places
from graftwork.peft.cuts import OUTPUT
from graftwork.peft.method import PEFT
from graftwork.peft.methods import DoRA, LoRA
from graftwork.peft.methods.dora import EMBEDDING

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``max_lora_rank``."""
UNSERVED = {"gpt2": "its GPT-2 takes no LoRA", "t5": "it has no encoder-decoder", "mt5": "it has no encoder-decoder"}
"""Families that vLLM has no LoRA for, with the reason."""
FIELDS = (
    "base_model_name_or_path",
    "bias",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
)
"""The fields that vLLM reads, and those that other readers need."""


def refuse_unserved(transform: PEFT, places: Places) -> None:
    """Raise ConfigError, with the reason, for an adapter that vLLM cannot serve."""
    why = UNSERVED.get(places.family.name)
    if isinstance(transform, DoRA):
        why = why or "it refuses adapters with use_dora"
    elif not isinstance(transform, LoRA):
        why = why or "it serves LoRA only"
    if why:
        raise ConfigError(
            f"{transform} cannot be served by vLLM: {why}; merge it and serve the model that export_hf writes, or "
            "leave for_ at 'peft'."
        )


def padded(transform: LoRA, places: Places, pairs: Sequence[Pair]) -> list[Pair]:
    """Return pairs that all have the next rank vLLM knows, zeros behind their own, and scale 1: it is folded into B.

    Raises ConfigError for a rank above all of these, and for updates beside attention and MLP.
    """
    for pair in pairs:
        if places.modules[pair.module].leaf in (EMBEDDING, OUTPUT):
            raise ConfigError(
                f"{transform} stands at {pair.module}, where not every model of vLLM takes LoRA; leave it out of "
                "target_modules, or leave for_ at 'peft'."
            )
    most = max(pair.rank for pair in pairs)
    rank = next((allowed for allowed in RANKS if allowed >= most), None)
    if rank is None:
        raise ConfigError(f"{transform} has rank {most}, but vLLM serves at most {RANKS[-1]}; merge it instead.")
    return [_padded(pair, rank, scale_of(pair.rank, pair.alpha, transform.use_rslora)) for pair in pairs]


def _padded(pair: Pair, rank: int, scale: float) -> Pair:
    (_, inputs), (outputs, _) = pair.A.shape, pair.B.shape
    low = Lazy((rank, inputs), partial(_wide, pair.A, (rank, inputs), 1.0))
    high = Lazy((outputs, rank), partial(_wide, pair.B, (outputs, rank), scale))
    return Pair(pair.module, rank, rank, low, high)


def _wide(factor: Lazy, shape: tuple[int, int], scale: float) -> Tensor:
    rows, columns = factor.shape
    wide = torch.zeros(shape)
    wide[:rows, :columns] = factor[:] * scale
    return wide
