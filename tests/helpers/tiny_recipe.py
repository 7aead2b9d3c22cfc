"""A recipe small enough for a test, as it is typed: a random Llama of four layers, its tokenizer and rows."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_run import write_data
from tests.helpers.tiny_tokenizer import tiny_tokenizer

SHAPE = {
    "num_layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rotary_base": 10000.0,
    "layernorm_epsilon": 1e-6,
    "tie_embeddings": False,
}


def make_place(root: Path) -> Path:
    """Write a base checkpoint with its tokenizer and a training file below ``root``; return it."""
    write_data(root)
    tiny_tokenizer(make_tiny("llama", root / "base", vocab_size=SHAPE["vocab_size"]), SHAPE["vocab_size"])
    return root


def overrides(place: Path, steps: int) -> list[str]:
    """Return the fields of a fp32 training of ``steps`` steps on what ``make_place`` has written."""
    return [
        *(f"model.shape.{name}={value}" for name, value in SHAPE.items()),
        f"model.checkpoint={place / 'base'}",
        "model.dtype=fp32",
        f"data.train={place / 'train.jsonl'}",
        f"data.cache_dir={place / 'cache'}",
        "data.validation_fraction=0.25",
        "data.seq_length=64",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps // 2}",
        "optim.lr=2e-3",
        "optim.warmup_steps=1",
        "samples=0",
    ]


def summary(run: Path) -> dict[str, Any]:
    """Return how a run in the directory ``run`` has ended."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found
