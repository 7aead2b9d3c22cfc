"""A new family needs one new file: the one of the documentation is entered, loaded, exported and withdrawn."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork import models
from graftwork.errors import CheckpointError, ConfigError
from graftwork.models import GPT, shapes
from graftwork.models.weights import FAMILIES, Family, family_of, family_table, fingerprint, read_config
from tests.helpers.snippets import ROOT, blocks, run_python
from tests.helpers.tiny_hf import ODD_VOCABULARY, make_tiny

FIELDS = {
    "depth": "num_hidden_layers",
    "width": "hidden_size",
    "inner_width": "intermediate_size",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "epsilon": "rms_norm_eps",
}
NAMES = {
    r"model\.embed_tokens": "tokens",
    r"model\.norm": "norm",
    r"lm_head": "head",
    r"model\.layers\.(\d+)\.input_layernorm": r"blocks.\1.norm_1",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"blocks.\1.norm_2",
    r"model\.layers\.(\d+)\.self_attn\.q_proj": r"blocks.\1.query",
    r"model\.layers\.(\d+)\.self_attn\.k_proj": r"blocks.\1.key",
    r"model\.layers\.(\d+)\.self_attn\.v_proj": r"blocks.\1.value",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"blocks.\1.attended",
    r"model\.layers\.(\d+)\.mlp\.gate_proj": r"blocks.\1.gate",
    r"model\.layers\.(\d+)\.mlp\.up_proj": r"blocks.\1.up",
    r"model\.layers\.(\d+)\.mlp\.down_proj": r"blocks.\1.down",
}


@pytest.fixture
def toy() -> Iterator[Family]:
    """The family of the page, entered."""
    namespace: dict[str, Any] = {"__name__": "page"}
    run_python(blocks(ROOT / "docs" / "adding-a-family.md")[:1], namespace)
    yield FAMILIES.enter("toy", namespace["Toy"]())
    FAMILIES.withdraw("toy")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path / "llama")


@pytest.fixture
def checkpoint(llama: Path, tmp_path: Path) -> Path:
    """The same weights in the toy's spelling."""
    directory = tmp_path / "toy"
    directory.mkdir()
    tensors = {toy_name(name): tensor for name, tensor in load_file(llama / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    theirs = read_config(llama)
    config = {"model_type": "toy", "gate": "silu", **{ours: theirs[field] for ours, field in FIELDS.items()}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def toy_name(name: str) -> str:
    (renamed,) = {re.sub(f"^{old}(?=\\.weight$)", new, name) for old, new in NAMES.items()} - {name}
    return renamed


def logits(model: models.Model) -> Tensor:
    tokens = torch.randint(ODD_VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(tokens)


def test_a_toy_family_computes_what_llama_computes(toy: Family, llama: Path, checkpoint: Path) -> None:
    model = models.load(checkpoint)
    assert isinstance(model, GPT) and model.shape.family == "toy"
    assert torch.equal(logits(model), logits(models.load(llama)))
    assert fingerprint(checkpoint) != fingerprint(llama)


def test_its_export_is_the_inverse_of_loading(toy: Family, checkpoint: Path, tmp_path: Path) -> None:
    model = models.load(checkpoint)
    model.export_hf(tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = read_config(tmp_path / "out")
    assert config["architectures"] == ["ToyForCausalLM"] and config["wavelength"] == 10000.0
    assert models.load(tmp_path / "out").shape == model.shape


def test_lists_of_families_follow_from_the_entry(toy: Family, checkpoint: Path) -> None:
    assert family_of(read_config(checkpoint)) is toy
    assert "| `toy` | LLaMA's layers under other names |" in family_table()
    with pytest.raises(CheckpointError, match="did you mean 'toy'"):
        family_of({"model_type": "toyy"})
    with pytest.raises(CheckpointError, match="gate='gelu' of config.json is not supported; valid: 'silu'"):
        toy.read({**read_config(checkpoint), "gate": "gelu"})
    with pytest.raises(ConfigError, match="there is a family 'toy' already"):
        FAMILIES.enter("toy", toy)


def test_withdrawn_it_is_unknown_again(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="model_type 'toy' is not supported; valid: gpt2, llama, mistral"):
        models.load(checkpoint)
    with pytest.raises(ConfigError, match="Shape.family is 'toy'; valid: gpt2"):
        shapes.llama2_7b(family="toy")
