"""Hugging Face ``config.json`` <-> Shape."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from graftwork.errors import CheckpointError, ConfigError, suggest
from graftwork.models.shapes.shape import Shape
from graftwork.models.weights.hf.rope import read_rope, write_rope

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return ``config.json`` of a Hugging Face checkpoint directory.

    Raises CheckpointError when the directory or the file is missing or is no JSON object.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"the checkpoint directory {str(folder)!r} does not exist.")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} has no config.json: a Hugging Face checkpoint directory is expected.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(path)!r} is not a JSON object.")
    return config


def shape_from_hf(config: dict[str, Any]) -> Shape:
    """Return the Shape of a Hugging Face config; raises CheckpointError for a model that cannot be expressed."""
    family = str(config.get("model_type"))
    if family not in ARCHITECTURES:
        raise CheckpointError(f"model_type {family!r} is not supported; {suggest(family, ARCHITECTURES)}")
    read = _read_gpt2 if family == "gpt2" else _read_nemotron if family == "nemotron" else _read_llama
    try:
        return Shape(family=family, **read(config))
    except KeyError as error:
        raise CheckpointError(f"config.json of this {family} model has no field {error}.") from error
    except ConfigError as error:
        raise CheckpointError(f"config.json describes no valid model: {error}") from error


def hf_config(shape: Shape) -> dict[str, Any]:
    """Return the Hugging Face config of ``shape``; ``shape_from_hf`` is its inverse.

    Raises ConfigError when no model of this family has such a shape.
    """
    write = _write_gpt2 if shape.family == "gpt2" else _write_llama
    common = {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_embeddings,
    }
    config = {**common, **write(shape)}
    _check_expressible(shape, shape_from_hf(config))
    return config


def _check_expressible(shape: Shape, back: Shape) -> None:
    # Dropout is a training choice, not part of the weights: not every family has a place for it.
    differing = [f.name for f in fields(Shape) if getattr(shape, f.name) != getattr(back, f.name)]
    lost = [name for name in differing if not name.endswith("_dropout")]
    if lost:
        shown = ", ".join(f"{name}={getattr(shape, name)!r}" for name in lost)
        raise ConfigError(f"no Hugging Face {shape.family} model has {shown}.")


def _read_sizes(config: dict[str, Any]) -> dict[str, Any]:
    _refuse(config, "use_sliding_window", (None, False))
    if config.get("use_sliding_window") is None:
        _refuse_window(config)
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config.get("num_key_value_heads"),
        "kv_channels": config.get("head_dim"),
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "attention_dropout": float(config.get("attention_dropout", 0.0)),
        **read_rope(config),
    }


def _read_llama(config: dict[str, Any]) -> dict[str, Any]:
    _refuse(config, "hidden_act", ("silu",))
    return {
        **_read_sizes(config),
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "add_bias_linear": _linear_bias(config),
        "add_qkv_bias": config["model_type"] == "qwen2",
        "qk_layernorm": config["model_type"] == "qwen3",
    }


def _read_nemotron(config: dict[str, Any]) -> dict[str, Any]:
    _refuse(config, "hidden_act", (None, "relu2"))
    return {
        **_read_sizes(config),
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "layernorm_epsilon": config.get("norm_eps", 1e-5),
        "activation": "squared_relu",
        "add_bias_linear": _linear_bias(config),
    }


def _read_gpt2(config: dict[str, Any]) -> dict[str, Any]:
    _refuse(config, "activation_function", (None, *GELU))
    _refuse(config, "scale_attn_by_inverse_layer_idx", (None, False))
    _refuse(config, "scale_attn_weights", (None, True))
    _refuse(config, "add_cross_attention", (None, False))
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
        "num_attention_heads": config["n_head"],
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["n_positions"],
        "normalization": "LayerNorm",
        "layernorm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "activation": GELU[config.get("activation_function") or "gelu_new"],
        "add_bias_linear": True,
        "position_embedding": "learned",
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "hidden_dropout": float(config.get("resid_pdrop", 0.1)),
        "attention_dropout": float(config.get("attn_pdrop", 0.1)),
    }


def _write_llama(shape: Shape) -> dict[str, Any]:
    nemotron, biases = shape.family == "nemotron", shape.family in ("llama", "nemotron")
    return {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "relu2" if nemotron else "silu",
        "norm_eps" if nemotron else "rms_norm_eps": shape.layernorm_epsilon,
        "attention_dropout": shape.attention_dropout,
        **({"sliding_window": None} if shape.family == "mistral" else {}),
        **({"attention_bias": shape.add_bias_linear, "mlp_bias": shape.add_bias_linear} if biases else {}),
        **write_rope(shape),
    }


def _write_gpt2(shape: Shape) -> dict[str, Any]:
    return {
        "n_layer": shape.num_layers,
        "n_embd": shape.hidden_size,
        "n_inner": shape.ffn_hidden_size,
        "n_head": shape.num_attention_heads,
        "n_positions": shape.max_position_embeddings,
        "layer_norm_epsilon": shape.layernorm_epsilon,
        "activation_function": "gelu" if shape.activation == "gelu" else "gelu_new",
        "resid_pdrop": shape.hidden_dropout,
        "embd_pdrop": shape.hidden_dropout,
        "attn_pdrop": shape.attention_dropout,
    }


def _linear_bias(config: dict[str, Any]) -> bool:
    attention, mlp = (bool(config.get(field)) for field in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        raise CheckpointError("attention_bias and mlp_bias differ; both true or both false is supported.")
    return attention


def _refuse(config: dict[str, Any], field: str, valid: tuple[Any, ...]) -> None:
    if config.get(field) not in valid:
        names = ", ".join(repr(v) for v in valid if v is not None)
        raise CheckpointError(f"{field}={config.get(field)!r} of config.json is not supported; valid: {names}.")


def _refuse_window(config: dict[str, Any]) -> None:
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        raise CheckpointError(
            f"sliding_window={window} is not supported; valid: null, or at least max_position_embeddings "
            f"({config['max_position_embeddings']})."
        )
