"""Reading config.json: both spellings of rotary settings, what is refused, and the way back."""

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from graftwork.errors import CheckpointError, ConfigError
from graftwork.models import shapes
from graftwork.models.weights import hf_config, read_config, shape_from_hf
from tests.helpers.tiny_hf import FAMILIES, tiny_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_survives_both_directions(family: str) -> None:
    shape = shape_from_hf(tiny_model(family).config.to_dict())
    assert shape_from_hf(hf_config(shape)) == shape


@pytest.mark.parametrize(
    "name", ["llama3_70b", "gpt3_175b", "nemotron4_340b", "mixtral_8x7b", "qwen3_30b_a3b", "smollm2_135m"]
)
def test_published_shapes_survive(name: str) -> None:
    shape = getattr(shapes, name)()
    assert shape_from_hf(hf_config(shape)) == shape


def test_older_and_newer_rotary_settings_are_the_same() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, **LLAMA3_SCALING}
    older = shape_from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    newer = shape_from_hf({**LLAMA, "rope_parameters": {"rope_theta": 5e5, **scaling}})
    assert older == newer
    assert (older.rotary_base, older.rope_scaling_factor) == (5e5, 8.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported; did you mean 'llama'"),
        (
            {"model_type": "bert"},
            "model_type 'bert' is not supported; valid: gpt2, llama, mistral, mixtral, .* in all",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' of config.json is not supported; valid: 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling has low_freq_factor=None; only 1.0"),
        ({"attention_bias": True}, "attention_bias and mlp_bias differ"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0 of config.json is not supported; valid"),
        ({"sliding_window": 64}, "sliding_window=64 is not supported; valid: null, or at least max_position"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
            "the rope settings of config.json have 'short_factor', which is not supported",
        ),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"model_type": "phi3", "layer_types": ["sliding_attention"] * 2}, "layer_types=.* is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True of config.json is not supported; valid: False"),
        ({"num_attention_heads": 5}, "config.json describes no valid model: Shape.num_attention_heads=5 must divide"),
        ({"hidden_size": None}, "config.json describes no valid model"),
    ],
)
def test_unsupported_configs_are_one_sentence(changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        shape_from_hf({**LLAMA, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "mixtral"])
def test_a_context_ends_where_a_window_does(model_type: str) -> None:
    config = {**LLAMA, "model_type": model_type, "num_key_value_heads": 4}
    shape = shape_from_hf({**config, "sliding_window": 64})
    assert (shape.max_position_embeddings, shape.sliding_window) == (64, 64)
    assert hf_config(shape)["sliding_window"] == 64  # whoever reads it computes the published model for any row
    assert shape_from_hf({**config, "sliding_window": 4096}).max_position_embeddings == 128
    assert shape_from_hf({**config, "sliding_window": None}).max_position_embeddings == 128
    with pytest.raises(ConfigError, match="sliding_window=64 would have an effect on rows of max_position_emb"):
        replace(shape, max_position_embeddings=65)
    with pytest.raises(ConfigError, match="no Hugging Face llama model has sliding_window=64"):
        hf_config(replace(shape_from_hf(LLAMA), max_position_embeddings=64, sliding_window=64))


def test_missing_field() -> None:
    config = {name: value for name, value in LLAMA.items() if name != "hidden_size"}
    with pytest.raises(CheckpointError, match="config.json of this llama model has no field 'hidden_size'"):
        shape_from_hf(config)


def test_shape_that_no_hugging_face_model_has() -> None:
    with pytest.raises(ConfigError, match="no Hugging Face llama model has normalization='LayerNorm'"):
        hf_config(shapes.llama2_7b(normalization="LayerNorm"))
    assert hf_config(shapes.llama2_7b(hidden_dropout=0.1))["model_type"] == "llama"


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config.json: a Hugging Face checkpoint directory is expected"):
        read_config(tmp_path)
    for text, message in [("{", "is not valid JSON"), ("[]", "is not a JSON object")]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path) == LLAMA


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma", "its embeddings are multiplied by the root of hidden_size"),
        ("gemma2", "its layers have a norm behind attention and one behind the MLP, and its attention scores and"),
        ("gemma3", "and most of them a window and a rotary base of their own"),
        ("gemma3_text", "and most of them a window and a rotary base of their own"),
    ],
)
def test_a_type_that_cannot_be_computed_exactly_is_refused_with_the_reason(model_type: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"model_type '{model_type}' is not supported: .*{reason}") as caught:
        shape_from_hf({**LLAMA, "model_type": model_type})
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and "; valid: llama, mistral, " in message


def test_the_reasons_are_true_of_the_installed_megatron_core() -> None:
    """The day one of these fails, a Gemma may have become possible."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    norms = {f.name for f in fields(TransformerLayerSubmodules) if "norm" in f.name}
    assert norms == {"input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm"}
    known = [f.name for f in fields(TransformerConfig)]
    assert not [name for name in known if "cap" in name and ("soft" in name or "logit" in name)]
    assert not [name for name in known if "embedding" in name and ("scale" in name or "multiplier" in name)]
    assert [name for name in inspect.signature(GPTModel).parameters if "rotary_base" in name] == ["rotary_base"]
