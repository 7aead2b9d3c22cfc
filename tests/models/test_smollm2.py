"""The embedded pretrained model: conversion against the GGUF library, logits against transformers, sense."""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open

from graftwork.data.tokenizer import checkpoint_tokenizer
from graftwork.models import shapes
from graftwork.models.weights import read_config, shape_from_hf
from graftwork.models.weights.hub import REGISTERED, resolve
from tests.helpers.core import loaded, logits
from tests.helpers.tiny_hf import oracle

pytestmark = pytest.mark.slow

TEXT = (
    "Photosynthesis is the process by which plants turn light, water and carbon dioxide into sugar and oxygen. "
    "It takes place in the chloroplasts of the leaves, whose green pigment absorbs mostly red and blue light. "
    "The capital of France is Paris, and 12 times 12 is 144. The river that runs through it is called the Seine."
)


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve("smollm2_135m")


def test_shape_is_the_published_one(directory: Path) -> None:
    assert shape_from_hf(read_config(directory)) == shapes.smollm2_135m()


def test_converted_tensors_equal_the_dequantised_ones(directory: Path) -> None:
    tensors = {t.name: t for t in gguf.GGUFReader(REGISTERED["smollm2_135m"].locate()).tensors}
    rows = [head * 64 + (channel % 32) * 2 + channel // 32 for head in range(9) for channel in range(64)]
    pairs = {
        "model.embed_tokens.weight": ("token_embd.weight", slice(None)),
        "model.norm.weight": ("output_norm.weight", slice(None)),
        "model.layers.7.self_attn.q_proj.weight": ("blk.7.attn_q.weight", rows),
        "model.layers.7.self_attn.k_proj.weight": ("blk.7.attn_k.weight", rows[: 3 * 64]),
        "model.layers.29.self_attn.v_proj.weight": ("blk.29.attn_v.weight", slice(None)),
        "model.layers.29.mlp.down_proj.weight": ("blk.29.ffn_down.weight", slice(None)),
    }
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert len(file.keys()) == len(tensors)
        for name, (source, order) in pairs.items():
            stored = tensors[source]
            expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())[order]
            assert torch.equal(file.get_tensor(name), expected.bfloat16()), name


def test_logits_equal_transformers_and_make_sense(directory: Path) -> None:
    tokenizer = checkpoint_tokenizer(directory)
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids[:, :64]
    assert tokens.shape == (1, 64)
    with torch.no_grad():
        theirs = oracle(directory)(tokens).logits
    module, _ = loaded(directory)
    ours = logits(module, tokens)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 2e-5
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(logits(module, prompt)[0, -1].argmax()) == " Paris"
