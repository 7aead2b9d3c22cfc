"""A tiny checkpoint with a real tokenizer, and a file of rows with a closed set of answers."""

import json
from pathlib import Path

import pytest

from graftwork.models import GPT, load
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TEMPLATE = "Review: {input}\nSentiment:"
LABELS = ["negative", "positive", "so so"]
TEXTS = (
    "a warm and funny film", "dull", "slow, noisy and far too long for what it says", "the actors were brilliant",
    "nobody laughed", "it moved everyone who saw it", "an empty sequel", "great story, a little long",
    "predictable", "glad did I live",
)  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random LLaMA of 300 tokens in which the end token is likely enough to occur."""
    directory = make_tiny("llama", tmp_path_factory.mktemp("tiny"), vocab_size=300)
    tiny_tokenizer(directory, 300)
    return directory


@pytest.fixture
def model(checkpoint) -> GPT:
    return load(checkpoint, dtype="fp32")


@pytest.fixture
def file(tmp_path) -> Path:
    """Rows of different lengths; the three answers have different numbers of tokens."""
    path = tmp_path / "held_out.jsonl"
    rows = [{"input": text, "output": LABELS[i % 3]} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
