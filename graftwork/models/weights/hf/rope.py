"""Rotary settings of a Hugging Face config, older (rope_theta, rope_scaling) or newer (rope_parameters)."""

from graftwork.errors import CheckpointError
from graftwork.models.shape import Shape
from graftwork.models.weights.hf.family import Config, ShapeFields, number

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""megatron-core fixes these three; LLaMA 3.1, 3.2 and 3.3 differ in the factor only."""


def read_rope(config: Config, share: float = 1.0) -> ShapeFields:
    """Return Shape's rotary fields; ``share``: the part of each head that is rotated when the config says nothing.

    Raises CheckpointError for a frequency scaling other than LLaMA 3's.
    """
    rope = {**_settings(config, "rope_scaling"), **_settings(config, "rope_parameters")}
    settings = {**config, **rope}
    return {
        "rotary_base": number(settings, "rope_theta", 10000.0),
        "rotary_percent": number(settings, "partial_rotary_factor", share),
        "rope_scaling_factor": _scaling_factor(rope),
    }


def write_rope(shape: Shape, share: float = 1.0) -> Config:
    """Return the config fields; the older form, which every transformers version reads."""
    written: dict[str, object] = {"rope_theta": shape.rotary_base}
    if share != 1.0 or shape.rotary_percent != 1.0:
        written["partial_rotary_factor"] = shape.rotary_percent
    if shape.rope_scaling_factor is not None:
        written["rope_scaling"] = {"rope_type": "llama3", "factor": shape.rope_scaling_factor, **LLAMA3}
    return written


def _settings(config: Config, field: str) -> dict[str, object]:
    value = config.get(field) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{field}={value!r} of config.json is not a JSON object.")
    return value


def _scaling_factor(rope: Config) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"rope_type {kind!r} is not supported; valid: 'default', 'llama3'.")
    for name, value in LLAMA3.items():
        if rope.get(name) != value:
            raise CheckpointError(f"rope scaling has {name}={rope.get(name)!r}; only {value} is supported.")
    return number(rope, "factor")
