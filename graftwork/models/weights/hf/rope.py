"""Rotary settings of a Hugging Face config, older (rope_theta, rope_scaling) or newer (rope_parameters)."""

from graftwork.errors import CheckpointError, quoted
from graftwork.models.shape import Shape
from graftwork.models.weights.hf.family import Config, ShapeFields, number

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""megatron-core fixes these three; LLaMA 3.1, 3.2 and 3.3 differ in the factor only."""


OUTER = ("rope_theta", "partial_rotary_factor")
"""Settings that older configs have beside the others' object."""
KNOWN = frozenset({"rope_theta", "partial_rotary_factor", "rope_type", "type", "factor", *LLAMA3})
"""Keys of the settings; one entry a kind of layer, or other scalings' keys, are not read."""


def read_rope(config: Config, share: float | None = None, base: float = 10000.0) -> ShapeFields:
    """Return Shape's rotary fields; ``share``: the part of each head that is rotated when the config says nothing.

    ``base``: rope_theta when the config says nothing. Families without a ``share`` rotate whole heads. Raises
    CheckpointError for a frequency scaling other than LLaMA 3's, and for settings that contradict each other: which of
    them counts depends on who reads.
    """
    rope = _settings(config)
    outer = {name: config[name] for name in (*OUTER, "original_max_position_embeddings") if name in config}
    for name in outer.keys() & rope.keys():
        if outer[name] != rope[name]:
            raise CheckpointError(
                f"config.json gives {name} twice: {quoted(outer[name])}, and {quoted(rope[name])} in its rope settings."
            )
    settings = {**outer, **rope}
    rotated = number(settings, "partial_rotary_factor", 1.0 if share is None else share)
    if share is None and rotated != 1.0:
        raise CheckpointError(f"partial_rotary_factor={rotated} of config.json is not supported; valid: 1.0.")
    return {
        "rotary_base": number(settings, "rope_theta", base),
        "rotary_percent": rotated,
        "rope_scaling_factor": _scaling_factor(settings),
    }


def write_rope(shape: Shape, share: float = 1.0) -> Config:
    """Return the config fields; the older form, which every transformers version reads."""
    written: dict[str, object] = {"rope_theta": shape.rotary_base}
    if share != 1.0 or shape.rotary_percent != 1.0:
        written["partial_rotary_factor"] = shape.rotary_percent
    if shape.rope_scaling_factor is not None:
        written["rope_scaling"] = {"rope_type": "llama3", "factor": shape.rope_scaling_factor, **LLAMA3}
    return written


def _settings(config: Config) -> dict[str, object]:
    """Return the settings, under their older or newer name; both only when they say the same."""
    older, newer = (_object(config, field) for field in ("rope_scaling", "rope_parameters"))
    if older and newer and older != newer:
        raise CheckpointError(
            "config.json has rope_scaling and rope_parameters, and they differ; one of them is valid."
        )
    found = older or newer
    unknown = [name for name, value in found.items() if name not in KNOWN and value is not None]
    if unknown:
        raise CheckpointError(f"the rope settings of config.json have {quoted(unknown[0])}, which is not supported.")
    return found


def _object(config: Config, field: str) -> dict[str, object]:
    value = config.get(field)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{field}={quoted(value)} of config.json is not a JSON object.")
    return value or {}


def _scaling_factor(rope: Config) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"rope_type {quoted(kind)} is not supported; valid: 'default', 'llama3'.")
    for name, value in LLAMA3.items():
        if rope.get(name) != value:
            raise CheckpointError(f"rope scaling has {name}={quoted(rope.get(name))}; only {value} is supported.")
    return number(rope, "factor")
