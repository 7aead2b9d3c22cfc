"""IA3 -> one vector for each Hugging Face module: on outputs for keys and values, on inputs for the MLP's second linear."""

from functools import partial

import torch
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.models.exchange.lazy import Held, Lazy
from graftwork.models.exchange.piece import LAYER_PREFIX, common
from graftwork.models.exchange.places import Linear, Places, shortest
from graftwork.peft.methods import IA3
from graftwork.peft.methods.ia3 import NORM, SECOND

SCALE = {"k": "scale_k", "v": "scale_v", "ffn": "scale_ffn"}
PART = {"k": "linear_k", "v": "linear_v"}
Vectors = dict[str, Lazy]
"""Hugging Face module -> its vector [n, 1], or [1, n] where it scales the module's inputs."""


def vectors_of(transform: IA3, places: Places, tensors: Held) -> Vectors:
    """Return the vectors of one adapter; raises ConfigError where keys are scaled behind their norm."""
    found: Vectors = {}
    for site in dict.fromkeys(name.rpartition(".")[0] for name in tensors.names):
        if site.endswith(f".{NORM}"):
            raise ConfigError(
                f"{transform} scales keys behind {NORM}, where Hugging Face PEFT scales nothing; train it with "
                'key_position="pre_norm", or serve it here.'
            )
        linear = places.linear(site)
        if linear.leaf == SECOND:
            vector = tensors.take(f"{site}.{SCALE['ffn']}", linear.inputs)
            found[linear.modules[0]] = Lazy((1, linear.inputs), partial(_unsqueezed, vector, 0))
        else:
            found |= _keys_and_values(linear, tensors)
    tensors.finish()
    return found


def config_of(transform: IA3, places: Places, vectors: Vectors, base: str | None) -> dict[str, object]:
    """Return ``adapter_config.json`` of these vectors."""
    second = [module for module in vectors if places.modules[module].leaf == SECOND]
    rest = [module for module in vectors if module not in second]
    first, feedforward = (shortest(names, places.modules) for names in (rest, second))
    return {
        **common("SEQ_2_SEQ_LM" if places.seq2seq else "CAUSAL_LM", base),
        "fan_in_fan_out": places.transposed,
        "feedforward_modules": feedforward,
        "init_ia3_weights": True,
        "peft_type": "IA3",
        "target_modules": [*first, *feedforward],
    }


def keyed(vectors: Vectors) -> dict[str, Lazy]:
    """Return the vectors as Hugging Face PEFT calls them."""
    return {f"{LAYER_PREFIX}{module}.ia3_l": vector for module, vector in vectors.items()}


def _keys_and_values(linear: Linear, tensors: Held) -> Vectors:
    held, given = set(tensors.names), {}
    for target, part in PART.items():
        name = f"{linear.site}.{SCALE[target]}"
        if name in held:
            given[part] = tensors.take(name, linear.counts[linear.parts.index(part)])
    if not linear.fused:
        return {
            linear.modules[linear.parts.index(part)]: Lazy((*vector.shape, 1), partial(_unsqueezed, vector, 1))
            for part, vector in given.items()
        }

    def whole() -> Tensor:
        parts = zip(linear.parts, linear.counts)
        return torch.cat([given[p][:] if p in given else torch.ones(n) for p, n in parts]).unsqueeze(1)

    return {linear.modules[0]: Lazy((sum(linear.counts), 1), whole)}


def _unsqueezed(vector: Lazy, dim: int) -> Tensor:
    return vector[:].unsqueeze(dim)
