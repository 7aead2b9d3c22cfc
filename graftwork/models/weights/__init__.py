"""Hugging Face checkpoints: one declarative mapping per family serves load, export and adapter export."""

from graftwork.models.weights.export import export_weights
from graftwork.models.weights.fingerprint import fingerprint
from graftwork.models.weights.hf.config import hf_config, read_config, shape_from_hf
from graftwork.models.weights.hf.families import mapping_for
from graftwork.models.weights.load import load_weights
from graftwork.models.weights.mapping import Mapping, Rule

__all__ = [
    "Mapping",
    "Rule",
    "export_weights",
    "fingerprint",
    "hf_config",
    "load_weights",
    "mapping_for",
    "read_config",
    "shape_from_hf",
]
