"""IA3 <-> a vector for each Hugging Face module: on outputs for keys and values, on inputs for the second linear."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.models.exchange.fields import Fields
from graftwork.models.exchange.lazy import Held, Lazy
from graftwork.models.exchange.piece import LAYER_PREFIX, common
from graftwork.models.exchange.places import Linear, Places, shortest
from graftwork.models.shape import Shape
from graftwork.peft.methods import IA3
from graftwork.peft.methods.ia3 import ATTENTION, FUSED, NORM, SECOND, TARGETS

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
        name = f"{linear.name}.{SCALE[target]}"
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


def arriving(
    fields: Fields, places: Places, shape: Shape, held: Held, name: str | None
) -> tuple[IA3, dict[str, Lazy], bool, str]:
    """Return the IA3 that a Hugging Face adapter is here; raises ArtifactError for scales without a place in it."""
    given = _vectors(fields, places, held)
    scaled = {(module, target): vector for module, found in given.items() for target, vector in found.items()}
    wanted = {module: places.modules[module] for module, _ in scaled}
    layers = _layers(wanted.values())
    kinds = [kind for kind, path in ATTENTION.items() if any(f".{path}." in linear.name for linear in wanted.values())]
    targets = [target for target in TARGETS if any(target == found for _, found in scaled)]
    transform = _transform(places, shape, targets, kinds, layers, name)
    _check_regular(fields, places, transform, set(scaled), layers)
    return transform, {f"{wanted[m].name}.{SCALE[t]}": vector for (m, t), vector in scaled.items()}, False, ""


def _transform(
    places: Places, shape: Shape, targets: list[str], kinds: list[str], layers: dict[str, set[int]], name: str | None
) -> IA3:
    """Return an IA3 that scales these in these layers."""
    depths = _layers(linear for linear in places.linears.values() if linear.leaf == SECOND)
    chosen = {stack: sorted(found) for stack, found in layers.items()}
    options: dict[str, Any] = {
        "targets": targets,
        "key_position": "pre_norm" if shape.qk_layernorm and "k" in targets else None,
        "attention": kinds or None,
        "layers": None if layers == depths else chosen,
    }
    return IA3(**options) if name is None else IA3(name, **options)


def _check_regular(
    fields: Fields, places: Places, transform: IA3, scaled: set[tuple[str, str]], layers: dict[str, set[int]]
) -> None:
    """Raise ArtifactError unless the same is scaled in every layer and attention that has it, as ours does."""
    inside = [f"{ATTENTION[kind]}.{FUSED[kind]}" for kind in transform.attention or ()]
    for linear in places.linears.values():
        if linear.layer not in layers.get(linear.part or "", ()):
            continue
        for target in transform.targets or ():
            if target == "ffn" and linear.leaf == SECOND:
                module = linear.modules[0]
            elif target != "ffn" and linear.inside in inside:
                module = linear.modules[0 if linear.fused else linear.parts.index(PART[target])]
            else:
                continue
            if (module, target) not in scaled:
                fields.refuse("target_modules", f"IA3 scales the same in each of its layers, but {module} is left out")


def _layers(linears: Iterable[Linear]) -> dict[str, set[int]]:
    """Return the layers of linears by the part of the model."""
    found: dict[str, set[int]] = {}
    for linear in linears:
        if linear.layer is not None:
            found.setdefault(linear.part or "", set()).add(linear.layer)
    return found


def _vectors(fields: Fields, places: Places, held: Held) -> dict[str, dict[str, Lazy]]:
    """Return, by module, the vectors [n] by target; of a fused module its key rows and its value rows."""
    wanted, feedforward = fields.targeted(places.modules), fields.names("feedforward_modules")
    if not wanted:
        fields.refuse("target_modules", f"this {places.family.name} has no such module")
    found = {}
    for module, linear in places.modules.items():
        if module not in wanted:
            continue
        on_inputs = any(module.endswith(end) for end in feedforward)
        index = linear.modules.index(module)
        keys_values = "linear_k" in linear.parts and (linear.fused or linear.parts[index] in PART.values())
        if on_inputs != (linear.leaf == SECOND) or not (on_inputs or keys_values):
            where = "the inputs" if on_inputs else "the outputs"
            fields.refuse("target_modules", f"it scales {where} of {module}, where no IA3 of ours stands")
        key = f"{LAYER_PREFIX}{module}.ia3_l"
        if on_inputs:
            found[module] = {"ffn": _flat(held.take(key, 1, linear.inputs))}
        elif linear.fused:
            found[module] = _parts_of(linear, held.take(key, linear.widths[0], 1), fields)
        else:
            target = next(t for t, part in PART.items() if part == linear.parts[index])
            found[module] = {target: _flat(held.take(key, linear.widths[index], 1))}
    held.finish()
    return found


def _parts_of(linear: Linear, vector: Lazy, fields: Fields) -> dict[str, Lazy]:
    """Return key and value rows of a fused module's vector, whose query rows must be ones."""
    query, key, value = vector[:].flatten().split(linear.counts)
    if not torch.equal(query, torch.ones_like(query)):
        fields.refuse("target_modules", f"it scales queries too, at {linear.modules[0]}, where no IA3 of ours stands")
    return {"k": Lazy(tuple(key.shape), lambda: key), "v": Lazy(tuple(value.shape), lambda: value)}


def _flat(vector: Lazy) -> Lazy:
    return Lazy((max(vector.shape),), lambda: vector[:].flatten())
