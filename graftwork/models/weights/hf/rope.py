"""Rotary settings of a Hugging Face config, older (rope_theta, rope_scaling) or newer (rope_parameters)."""

from typing import Any

from graftwork.errors import CheckpointError
from graftwork.models.shapes.shape import Shape

# megatron-core fixes these three; LLaMA 3.1, 3.2 and 3.3 differ in the factor only.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return Shape's rotary fields; raises CheckpointError for a frequency scaling other than LLaMA 3's."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    default_share = 0.5 if config.get("model_type") == "nemotron" else 1.0
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", default_share))
    return {
        "rotary_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "rotary_percent": float(share),
        "rope_scaling_factor": _scaling_factor(rope),
    }


def write_rope(shape: Shape) -> dict[str, Any]:
    """Return the config fields; the older form, which every transformers version reads."""
    fields: dict[str, Any] = {"rope_theta": shape.rotary_base}
    if shape.family == "nemotron" or shape.rotary_percent != 1.0:
        fields["partial_rotary_factor"] = shape.rotary_percent
    if shape.rope_scaling_factor is not None:
        fields["rope_scaling"] = {"rope_type": "llama3", "factor": shape.rope_scaling_factor, **LLAMA3}
    return fields


def _scaling_factor(rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"rope_type {kind!r} is not supported; valid: 'default', 'llama3'.")
    for name, value in LLAMA3.items():
        if rope.get(name) != value:
            raise CheckpointError(f"rope scaling has {name}={rope.get(name)!r}; only {value} is supported.")
    return float(rope["factor"])
