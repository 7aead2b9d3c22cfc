"""The models of the matrix, not yet built: weights from a checkpoint, or random ones."""

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.models import GPT, MODELS
from graftwork.models.base import Model
from graftwork.models.shapes import Shape
from graftwork.models.weights import family_of, read_config, shape_from_hf
from graftwork.parallel.record import Record, record_of
from graftwork.peft import IA3, PEFT, CanonicalAdapter, CanonicalLoRA, DoRA, LoRA, Selective
from tests.contracts.methods import STACKS
from tests.helpers.tiny_gpt import global_name
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_t5 import make_t5
from tests.parallel.layouts import Cell

MIXTURE = Shape(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=61,
    max_position_embeddings=64,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
)
EMBEDDING = "embedding.word_embeddings.weight"


def _beside(tied: bool) -> list[PEFT]:
    return [CanonicalAdapter(dim=6, parallel=True, tie_layers=tied), IA3()]


LENDING: dict[str, Callable[[], list[PEFT]]] = {
    "lent+tied": lambda: [Selective(patterns=["bias", "norm", "embedding", "linear_fc2.weight"]), *_beside(True)],
    "lent+parallel": lambda: [Selective(patterns=["bias", "norm", "embedding", "linear_fc2.weight"]), *_beside(False)],
    "lent experts": lambda: [Selective(patterns=["norm", "router", "experts"]), *_beside(True)],
    "shared experts": lambda: [
        DoRA(dim=4, target_modules=["linear_proj", "linear_fc1"]),
        CanonicalLoRA(dim=4, share_experts=True),
        LoRA(dim=4, share_experts=True),
    ],
}
"""Stacks for the models that have what they need: tensors of the base that train too, or experts that share."""


def _calm(tensors: dict[str, Tensor]) -> None:
    """Halve matrices; shrink queries, whose scores T5 does not scale, and an untied head as T5 draws them.

    Where attention saturates and logits are far apart, a rounding grows beyond any tolerance, in one process too.
    """
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "relative_attention_bias" not in name:
            small = name.endswith("ttention.q.weight") or name == "lm_head.weight"
            tensors[name] = tensor * 0.5 * (tensor.shape[1] ** -0.5 if small else 1.0)


CHECKPOINTS: dict[str, Callable[[str, Path], Path]] = {
    **dict.fromkeys(("llama", "gpt2", "qwen3", "qwen2_moe_every_other"), make_tiny),
    **dict.fromkeys(("t5", "mt5"), partial(make_t5, change=_calm, num_layers=1, num_decoder_layers=2)),
}


class Lively(GPT):
    """A GPT of random weights, four times as wide as usual, so that layers and experts differ visibly."""

    def configure_model(self) -> None:
        """Build, then scale the base's weights, not its norms."""
        fresh = self.module is None
        super().configure_model()
        for parameter in self.parameters() if fresh else ():
            if parameter.ndim == 2 and record_of(parameter).owner is None:
                parameter.data.mul_(4.0)


def write_checkpoints(root: Path) -> Path:
    """Write the tiny Hugging Face checkpoints below ``root``; their vocabulary has 101 words, padded at TP2."""
    for family, write in CHECKPOINTS.items():
        write(family, root / family)
    return root


def model_of(cell: Cell, root: Path) -> Model:
    """Return the cell's model with its adapters queued."""
    if cell.base == "mixture":
        model: Model = Lively(MIXTURE, dtype="fp32", recompute=cell.recompute)
    else:
        directory = root / cell.base
        config = read_config(directory)
        kind = MODELS[family_of(config).kind]
        model = kind(shape_from_hf(config), checkpoint=str(directory), dtype="fp32", recompute=cell.recompute)
    built = {**STACKS, **LENDING}.get(cell.subject)
    if built is not None:
        model.add_adapter(built())
    return model


def shake(model: Model) -> None:
    """Move every adapter value by noise drawn from its global name, so that no zero hides a gradient."""
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if record_of(parameter).owner is not None:
                parameter.data.add_(_drawn(key_of(chunk, name, parameter), record_of(parameter), 0.02))


def prompt_of(model: Any, row: int = 0) -> list[int]:
    """Return the virtual tokens of every attached prompt; tasks take turns, row by row."""
    layout = model.prompt_layout
    tasks = list(dict.fromkeys(slot.task for slot in layout.slots if slot.task is not None)) or [None]
    return [i for slot in layout.slots if slot.task in (None, tasks[row % len(tasks)]) for i in slot.ids]


def key_of(chunk: nn.Module, name: str, parameter: Tensor) -> str:
    """Return a parameter's global name; the last stage's copy of a tied embedding goes by the embedding's."""
    return EMBEDDING if getattr(parameter, "shared", False) else global_name(chunk, name)


def _drawn(key: str, record: Record, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    full = torch.randn(record.sharding.shape, generator=generator) * std
    return record.sharding.take(full, *record.place)
