"""Hugging Face's LoRA and DoRA -> LoRA, DoRA or CanonicalLoRA of ours.

Separate pairs for q, k and v become one of CanonicalLoRA's each; where they are the pieces of one pair, with the same
A, they become that pair again. DoRA has no such parts here: there the sum of them all is one pair, of the ranks' sum.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graftwork.models.exchange import sharing, stacks
from graftwork.models.exchange.fields import Fields, value_of
from graftwork.models.exchange.lazy import Held, Lazy
from graftwork.models.exchange.low_rank import MAGNITUDE, A, B, Pair, one_of, patterns
from graftwork.models.exchange.piece import LAYER_PREFIX
from graftwork.models.exchange.places import Linear, Places, Stacked, shortest
from graftwork.models.exchange.sharing import Update
from graftwork.models.shape import Shape
from graftwork.peft.cuts import OUTPUT
from graftwork.peft.methods import CanonicalLoRA, DoRA, LoRA
from graftwork.peft.methods.dora import EMBEDDING

ALL = "all-linear"
Group = dict[int, Pair]
"""The pairs at one of our linears, by the index of its Hugging Face module."""


def arriving(
    fields: Fields, places: Places, shape: Shape, held: Held, name: str | None
) -> tuple[LoRA, dict[str, Lazy], bool, str]:
    """Return the transform, its tensors, whether values follow from the base, and what is to be said."""
    rslora = fields.flag("use_rslora")
    method: type[LoRA]
    groups = _grouped(_pairs(fields, places, held), places)
    if fields.flag("use_dora"):
        method, note = DoRA, "q, k, v (and gate, up) share one pair here, of the sum of their ranks"
        updates = [_scaled(places.linears[site], group, rslora) for site, group in groups.items()]
        note = "" if all(_is_one(places.linears[site], group) for site, group in groups.items()) else note
    elif all(_is_one(places.linears[site], group) for site, group in groups.items()):
        method, note = LoRA, ""
        updates = [_whole(places.linears[site], group) for site, group in groups.items()]
    else:
        method, note = CanonicalLoRA, "q, k, v, gate and up keep pairs of their own"
        updates = [u for site, group in groups.items() for u in _separate(places.linears[site], group)]
    targets = shortest([update[0] for update in updates], places.updates(method is CanonicalLoRA))
    one = None if method is DoRA else sharing.shared(updates, places)
    updates = updates if one is None else one
    options = {**_options(fields, updates, targets), "use_rslora": rslora, "lora_A_init_method": "kaiming"}
    options |= {} if one is None else {"share_experts": True}
    transform = method(**options) if name is None else method(name, **options)
    partial_rows = any(len(group) < len(places.linears[site].modules) for site, group in groups.items())
    return transform, {k: v for update in updates for k, v in update[3].items()}, method is DoRA and partial_rows, note


def _options(fields: Fields, updates: Iterable[Update], targets: list[str]) -> dict[str, Any]:
    """Return where the updates stand, and their ranks and alphas: those of the fields, and patterns for the others."""
    dim, alpha = fields.whole("r"), fields.number("lora_alpha", 8)
    ranks, alphas = {u[0]: u[1] for u in updates}, {u[0]: u[2] for u in updates}
    return {
        "target_modules": targets,
        "dim": dim,
        "alpha": alpha,
        "dropout": fields.number("lora_dropout", 0.0),
        "rank_pattern": patterns(ranks, dim) or None,
        "alpha_pattern": patterns(alphas, alpha) or None,
    }


def _pairs(fields: Fields, places: Places, held: Held) -> dict[str, Pair]:
    """Return the pair of every targeted module; raises ArtifactError for tensors that are missing or too many."""
    parameters = _parameters(fields, places)
    wanted = _modules(fields, places, bool(parameters))
    dora, rslora, found, scale = fields.flag("use_dora"), fields.flag("use_rslora"), dict[str, Pair](), _scales(fields)
    for module, linear in places.modules.items():
        if module in wanted:
            found[module] = _pair(linear, module, *scale(module), dora, held)
            if found[module].embedding and (dora or places.seq2seq):
                fields.refuse(
                    "target_modules", f"{module} is no linear, and can have a LoRA of a decoder-only model only"
                )
    holders = stacks.nested([stack for stack in parameters.values() if isinstance(stack, Stacked)])
    recent = stacks.Recent()
    for name, parameter in parameters.items():
        if isinstance(parameter, Stacked):
            found |= stacks.apart(parameter, holders[name], *scale(name), rslora, held, recent)
        else:
            module = name.removesuffix(".weight")
            found[module] = _pair(parameter, module, *scale(name), False, held)
    held.finish()
    return found


def _modules(fields: Fields, places: Places, others: bool) -> set[str]:
    """Return the targeted modules; raises ArtifactError for none, unless there are ``others``."""
    given = fields.config.get("target_modules")
    if others and not given:
        return set()
    if given == ALL:
        return {m for m, linear in places.modules.items() if linear.leaf not in (EMBEDDING, OUTPUT)}
    wanted = fields.targeted(places.modules)
    if not (wanted or others):
        fields.refuse("target_modules", f"this {places.family.name} has no such module")
    return wanted


def _parameters(fields: Fields, places: Places) -> dict[str, Linear | Stacked]:
    """Return the targeted parameters by name, in the model's order; raises ArtifactError for one that is no linear."""
    if not fields.config.get("target_parameters"):
        return {}
    wanted = fields.targeted_parameters(places.every_parameter)
    for name in sorted(wanted - places.parameters.keys()):
        fields.refuse("target_parameters", f"{name} is no linear that has a LoRA here")
    if not wanted:
        fields.refuse("target_parameters", f"this {places.family.name} has no such parameter")
    for field in ("use_dora", "lora_dropout"):
        if fields.config.get(field):
            fields.refuse(field, "with target_parameters Hugging Face PEFT has none")
    return {name: parameter for name, parameter in places.parameters.items() if name in wanted}


def _scales(fields: Fields) -> Callable[[str], tuple[int, float]]:
    """Return what tells rank and alpha of a module or parameter by its name."""
    ranks, alphas = fields.patterns("rank_pattern"), fields.patterns("alpha_pattern")
    dim, alpha = fields.whole("r"), fields.number("lora_alpha", 8)

    def told(name: str) -> tuple[int, float]:
        rank = value_of(ranks, name, dim)
        if not isinstance(rank, int):
            fields.refuse("rank_pattern", "ranks are whole numbers")
        return int(rank), value_of(alphas, name, alpha)

    return told


def _pair(linear: Linear, module: str, rank: int, alpha: float, dora: bool, held: Held) -> Pair:
    stem, width = f"{LAYER_PREFIX}{module}.", linear.widths[linear.modules.index(module)]
    if linear.leaf == EMBEDDING:
        low = held.take(f"{stem}lora_embedding_A", rank, width)
        return Pair(module, rank, alpha, low, held.take(f"{stem}lora_embedding_B", linear.inputs, rank), embedding=True)
    low = held.take(f"{stem}lora_A.weight", rank, linear.inputs)
    high = held.take(f"{stem}lora_B.weight", width, rank)
    return Pair(module, rank, alpha, low, high, held.take(f"{stem}lora_magnitude_vector", width) if dora else None)


def _grouped(pairs: Mapping[str, Pair], places: Places) -> dict[str, Group]:
    found: dict[str, Group] = {}
    for module, pair in pairs.items():
        linear = places.modules[module]
        found.setdefault(linear.name, {})[linear.modules.index(module)] = pair
    return found


def _is_one(linear: Linear, group: Group) -> bool:
    """Tell whether the pairs are the pieces of one: all are there, with the same A, rank and alpha."""
    first, *others = group.values()
    if len(group) < len(linear.modules):
        return False
    same = all((pair.rank, pair.alpha) == (first.rank, first.alpha) for pair in others)
    return same and all(torch.equal(pair.A[:], first.A[:]) for pair in others)


def _whole(linear: Linear, group: Group) -> Update:
    """Return the one pair whose pieces these are."""
    first = group[0]
    if first.embedding:
        rank, vocabulary = first.A.shape
        low = Lazy((vocabulary, rank), lambda: first.A[:].T.contiguous())
        return _named(linear, linear.name, first.rank, first.alpha, low, first.B)
    high = Lazy((sum(linear.widths), first.rank), lambda: linear.join([group[i].B[:] for i in sorted(group)]))
    return _named(linear, linear.name, first.rank, first.alpha, first.A, high)


def _separate(linear: Linear, group: Group) -> list[Update]:
    """Return the updates of CanonicalLoRA, one for each pair."""
    if len(linear.modules) == 1:
        _, rank, alpha, tensors = _whole(linear, group)
        return [(linear.updates[0], rank, alpha, tensors)]
    return [
        _named(linear, linear.updates[i], pair.rank, pair.alpha, pair.A, pair.B, f"{linear.parts[i]}_")
        for i, pair in group.items()
    ]


def _scaled(linear: Linear, group: Group, rslora: bool) -> Update:
    """Return the update of DoRA: the one pair, or the sum of all, and the magnitudes of all rows.

    Rows of modules that have none are NaN: they keep the length that the base has.
    """
    if _is_one(linear, group):
        name, rank, alpha, tensors = _whole(linear, group)
    else:
        summed = one_of(linear, group, rslora)
        order = partial(_in_our_order, linear, summed.B)
        name, rank, alpha, tensors = _named(
            linear, linear.name, summed.rank, summed.alpha, summed.A, Lazy(summed.B.shape, order)
        )

    def lengths() -> Tensor:
        widths = enumerate(linear.widths)
        return linear.join([_lengths(group[i]) if i in group else torch.full((n,), torch.nan) for i, n in widths])

    return name, rank, alpha, {**tensors, f"{linear.name}.{MAGNITUDE}": Lazy((sum(linear.widths),), lengths)}


def _lengths(pair: Pair) -> Tensor:
    assert pair.magnitude is not None
    return pair.magnitude[:]


def _in_our_order(linear: Linear, stacked: Lazy) -> Tensor:
    """Return rows that stand part after part as ours stand."""
    return linear.join(list(stacked[:].split(linear.widths)))


def _named(linear: Linear, name: str, rank: int, alpha: float, low: Lazy, high: Lazy, prefix: str = "") -> Update:
    return name, rank, alpha, {f"{linear.name}.{prefix}{A}": low, f"{linear.name}.{prefix}{B}": high}
