"""Tiny T5 and mT5: random checkpoints by transformers, random models of our own, ids and masks for both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from graftwork.models import T5
from graftwork.models.shapes import T5Shape
from tests.contracts.methods import roughen

VOCABULARY = 101
"""Odd, so that padding at TP2 is not a no-op."""
KINDS: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", "feed_forward_proj": "relu"},
    "t5v11": {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5_tied": {"model_type": "mt5", "feed_forward_proj": "gated-gelu"},
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 16,  # more channels than hidden size / heads
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def make_t5(
    kind: str,
    directory: Path,
    seed: int = 0,
    dtype: str = "float32",
    change: Callable[[dict[str, Tensor]], None] | None = None,
    **fields: Any,
) -> Path:
    """Save a random checkpoint; ``change`` edits its tensors. An untied one has a head of its own."""
    torch.manual_seed(seed)
    settings = AutoConfig.for_model(**{**SIZES, **KINDS[kind], **fields})
    model = AutoModelForSeq2SeqLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.08))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    if KINDS[kind].get("tie_word_embeddings") is False:
        # transformers makes tied models only; as published, the head is a tensor beside the embeddings.
        tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    if change is not None:
        change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def oracle(directory: Path) -> PreTrainedModel:
    """Return transformers' own model of a checkpoint directory, in fp32."""
    return AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()


def shape(kind: str = "t5", **fields: Any) -> T5Shape:
    """Return our shape of a kind, two layers in the encoder and three in the decoder."""
    untied = KINDS[kind].get("tie_word_embeddings") is False
    sizes = {
        "num_layers": 2,
        "num_decoder_layers": 3,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "vocab_size": VOCABULARY,
        "family": KINDS[kind]["model_type"],
        "activation": "relu" if kind == "t5" else "geglu_tanh",
        "tie_embeddings": not untied,
        "scale_output": kind == "t5",
    }
    return T5Shape(**{**sizes, **fields})


def tiny(kind: str = "t5", fields: dict[str, Any] | None = None, **options: Any) -> T5:
    """Build a random model whose norms are not at ones."""
    model = T5(shape(kind, **(fields or {})), **{"dtype": "fp32", **options})
    model.configure_model()
    roughen(model)
    return model


def ids() -> tuple[Tensor, Tensor]:
    """Return source ids [3, 30] and decoder ids [3, 17]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, 40, (3, 30), generator=generator), torch.randint(1, 40, (3, 17), generator=generator)


def masks(left: bool = False) -> tuple[Tensor, Tensor]:
    """Return masks of both: rows of different lengths, padded on the right or on the left."""
    source, target = torch.ones(3, 30, dtype=torch.long), torch.ones(3, 17, dtype=torch.long)
    source[1, -9:] = source[2, -3:] = target[1, -5:] = 0
    return (source.flip(1), target.flip(1)) if left else (source, target)
