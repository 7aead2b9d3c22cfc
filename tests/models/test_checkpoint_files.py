"""Which files of a checkpoint directory are read, and what of them is refused before anything is allocated."""

import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graftwork.errors import CheckpointError, ConfigError
from graftwork.models import GPT, load
from graftwork.models.weights import check_checkpoint, export_weights, read_config, shape_from_hf
from graftwork.models.weights.files import INDEX, SINGLE
from tests.helpers.core import loaded, logits
from tests.helpers.tiny_hf import make_tiny, oracle

TOKENS = torch.arange(3, 40)[None]


def edit(directory: Path, **changes: Any) -> Path:
    """Change fields of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def rewrite(directory: Path, **tensors: torch.Tensor) -> Path:
    """Change tensors of the single file; ``__`` stands for a dot."""
    held = load_file(directory / SINGLE)
    held |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(held, directory / SINGLE, metadata={"format": "pt"})
    return directory


def sharded(directory: Path) -> Path:
    """Write the checkpoint again in many files."""
    module, shape = loaded(directory)
    export_weights(module, shape, directory.with_name("many"), shard_bytes=100_000)
    return directory.with_name("many")


def refusal(directory: Path) -> str:
    """Return the sentence that refuses a checkpoint, told before anything is built."""
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def test_a_single_file_wins_over_a_stale_index(tmp_path: Path) -> None:
    stale, fresh = sharded(make_tiny("llama", tmp_path / "one")), make_tiny("llama", tmp_path / "two", seed=1)
    (fresh / SINGLE).rename(stale / SINGLE)
    module, _ = loaded(stale)
    with torch.no_grad():
        theirs = oracle(stale)(TOKENS).logits
    assert (logits(module, TOKENS) - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_another_head_beside_tied_embeddings(tmp_path: Path) -> None:
    directory = make_tiny("llama_tied", tmp_path / "hf")
    embedding = load_file(directory / SINGLE)["model.embed_tokens.weight"]
    other = embedding.clone()
    other[50, 7] += 1e-3
    rewrite(directory, lm_head__weight=other)
    # transformers warns and does not tie: the head is its own there.
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(theirs.lm_head.weight, other) and not torch.equal(theirs.model.embed_tokens.weight, other)
    assert "ties lm_head.weight to model.embed_tokens.weight" in refusal(directory)
    edit(directory, tie_word_embeddings=False)
    module, _ = loaded(directory)
    assert torch.equal(module.output_layer.weight[:101], other)
    edit(directory, tie_word_embeddings=True)
    rewrite(directory, lm_head__weight=embedding.bfloat16())
    assert "ties lm_head.weight" in refusal(directory)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "nemotron"])
def test_tensors_that_nothing_uses(family: str, tmp_path: Path) -> None:
    directory = make_tiny(family, tmp_path / "hf")
    for name in (
        "score__weight",
        "model__layers__0__self_attn__q_proj__lora_A",
        "rotary_emb__inv_freqs",
        "h__0__x__attn__bias",
    ):
        held = load_file(directory / SINGLE)
        rewrite(directory, **{name: torch.zeros(2)})
        assert "1 tensor(s) unexpected" in refusal(directory)
        save_file(held, directory / SINGLE, metadata={"format": "pt"})


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    directory = make_tiny("gpt2", tmp_path / "hf")
    rewrite(directory, ln_f__weight=torch.ones(48))
    assert "holds one tensor twice" in refusal(directory)


@pytest.mark.parametrize(
    "places, message",
    [
        ({"a": "../one/model.safetensors"}, "names the file '../one/model.safetensors'"),
        ({"a": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"a": "a\0b"}, r"names the file 'a\x00b'"),
        ({"a": "x" * 300}, "names the file 'xxx"),
        ({"a": "x" * 10**6}, "names the file 'xxx"),
        ({"a": 3}, "does not fit: 'weight_map.a'"),
        ({"a": None}, "does not fit: 'weight_map.a'"),
        (["a"], "does not fit: 'weight_map'"),
        (None, "does not fit: 'weight_map'"),
        ({"a": "link.safetensors"}, "leads out of its directory"),
        ({"a": "pipe.safetensors"}, "names files that are not there"),
        ({}, "tensor(s) missing"),
    ],
)
def test_indices_that_name_what_they_must_not(places: object, message: str, tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "one")
    directory = make_tiny("llama", tmp_path / "hf")
    (directory / SINGLE).unlink()
    (directory / "link.safetensors").symlink_to("../one/model.safetensors")
    os.mkfifo(directory / "pipe.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    assert message in refusal(directory)


def test_an_index_must_place_every_tensor_of_its_files(tmp_path: Path) -> None:
    directory = sharded(make_tiny("llama", tmp_path / "one"))
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (directory / INDEX).write_text(json.dumps(index))
    assert "holds 'model.norm.weight', which" in refusal(directory)


def test_links_that_lead_outside(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    (directory / SINGLE).rename(tmp_path / "weights")
    (directory / SINGLE).symlink_to(tmp_path / "weights")
    assert "leads out of its directory" in refusal(directory)
    (directory / SINGLE).unlink()
    (tmp_path / "weights").rename(directory / SINGLE)
    (directory / "config.json").rename(tmp_path / "config")
    (directory / "config.json").symlink_to(tmp_path / "config")
    assert "leads out of its directory" in refusal(directory)
    (tmp_path / "alias").symlink_to(make_tiny("llama", tmp_path / "good"))
    load(tmp_path / "alias")


@pytest.mark.parametrize("name", ["a\0b", "n" * 5000, "x/" * 3000 + "y", "~nobody-of-that-name/x", "a/b\0"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(name)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**12},
        {"hidden_size": 4 * 10**8, "head_dim": 12},
        {"num_hidden_layers": 10**9},
        {"intermediate_size": 10**300},
        {"num_attention_heads": 10**9 + 7},
        {"max_position_embeddings": 0},
    ],
)
def test_absurd_sizes_cost_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    directory = edit(make_tiny("llama", tmp_path / "hf"), **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(directory)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_formats_that_are_not_read(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    rewrite(directory, model__norm__weight=torch.ones(48).to(torch.float8_e4m3fn))
    assert "not supported (valid: F32, BF16, F16, F64): model.norm.weight is F8_E4M3" in refusal(directory)
    rewrite(directory, model__norm__weight=torch.ones(48, dtype=torch.int32))
    assert "model.norm.weight is I32" in refusal(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    bad = load_file(directory / SINGLE)["model.layers.2.self_attn.k_proj.weight"]
    bad[3, 5] = value
    rewrite(directory, model__layers__2__self_attn__k_proj__weight=bad)
    assert "are NaN or infinite in model.layers.2.self_attn.k_proj.weight;" in refusal(directory)


def test_a_models_shape_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    shape = shape_from_hf(read_config(directory))
    other = replace(shape, rotary_base=100000.0, layernorm_epsilon=1e-3)
    model = GPT(other, checkpoint=str(directory))
    with pytest.raises(CheckpointError, match=r"layernorm_epsilon=0.001 \(there 1e-06\), rotary_base=100000.0 \(there"):
        model.configure_model()
    assert model.module is None
    GPT(replace(shape, attention_dropout=0.1, hidden_dropout=0.1), checkpoint=str(directory)).configure_model()
    with pytest.raises(CheckpointError, match="max_position_embeddings=256 "):
        check_checkpoint(replace(shape, max_position_embeddings=256), directory)


@pytest.mark.parametrize("name", [["bfloat16"], 3, "x" * 10**6, "float8_e4m3fn"])
def test_a_dtype_of_the_wrong_kind(name: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose dtype='bf16' or dtype='fp32'") as caught:
        load(edit(make_tiny("llama", tmp_path / "hf"), dtype=name))
    assert len(str(caught.value)) < 500
