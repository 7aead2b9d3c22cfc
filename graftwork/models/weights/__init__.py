"""Base weights: where they come from (hub, GGUF), how they are read, drawn, gathered, exported and told apart.

One declarative mapping a family, in ``hf``, serves every direction. Nothing here knows adapters or LightningModules.
"""

from graftwork.models.weights.export import export_weights
from graftwork.models.weights.fingerprint import fingerprint
from graftwork.models.weights.hf import (
    FAMILIES,
    Family,
    check_architecture,
    family_named,
    family_of,
    family_table,
    hf_config,
    mapping_for,
    read_config,
    shape_from_hf,
)
from graftwork.models.weights.load import check_checkpoint, load_weights
from graftwork.models.weights.mapping import Mapping, Rule

__all__ = [
    "FAMILIES",
    "Family",
    "Mapping",
    "Rule",
    "check_architecture",
    "check_checkpoint",
    "export_weights",
    "family_named",
    "family_of",
    "family_table",
    "fingerprint",
    "hf_config",
    "load_weights",
    "mapping_for",
    "read_config",
    "shape_from_hf",
]
