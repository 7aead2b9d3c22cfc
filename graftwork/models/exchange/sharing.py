"""One pair of factors for all experts of a layer: taken apart into a pair for each of them, and put together again."""

import re
from collections.abc import Mapping, Sequence

import torch

from graftwork.models.exchange.lazy import Lazy, Readable
from graftwork.models.exchange.places import Linear, Places
from graftwork.peft.cuts import GATED
from graftwork.peft.methods.ia3 import SECOND
from graftwork.peft.methods.lora import unnumbered

_SHARED = re.compile(r"(.+\.experts)\.(\w+)_(lora_[AB])")
_NUMBER = re.compile(r"\.experts\.local_experts\.(\d+)\.")
Update = tuple[str, int, float, dict[str, Lazy]]
"""One update of ours: its name, rank, alpha, and its tensors by key."""


def spread(tensors: Mapping[str, Readable], places: Places) -> dict[str, Readable]:
    """Return tensors by name, those that experts share once for each expert, under the name of a pair of its own."""
    found: dict[str, Readable] = {}
    for name, tensor in tensors.items():
        shared = _SHARED.fullmatch(name) if places.experts else None
        names = _names(shared, places) if shared else []
        found |= dict.fromkeys(names or [name], tensor)
    return found


def expert_of(name: str) -> int | None:
    """Return the number of the expert that a name belongs to, None for what is no expert's."""
    found = _NUMBER.search(name)
    return int(found.group(1)) if found else None


def gathered(key: str, linear: Linear) -> str:
    """Return what a tensor of one expert's ``linear`` is called where experts share it: the inverse of ``spread``."""
    rest = key.removeprefix(f"{linear.name}.")
    own = rest if any(rest.startswith(f"{part}_") for part in linear.parts) else f"{linear.leaf}_{rest}"
    return f"{unnumbered(linear.name).removesuffix(f'.{linear.leaf}')}.{own}"


def shared(updates: Sequence[Update], places: Places) -> list[Update] | None:
    """Return the updates with one for all experts of a layer, where they are the same bit for bit; None elsewhere."""
    groups: dict[str, list[Update]] = {}
    for update in updates:
        groups.setdefault(unnumbered(update[0]), []).append(update)
    of_experts = [group for group in groups.values() if expert_of(group[0][0]) is not None]
    if not of_experts or not all(len(group) == places.experts and _same(group) for group in of_experts):
        return None
    return [_one(name, group, places) for name, group in groups.items()]


def _names(key: re.Match[str], places: Places) -> list[str]:
    """Return what a shared factor is called at each expert; none where there is no such linear."""
    (site, leaf, factor), names = key.groups(), list[str]()
    for expert in range(places.experts):
        held = (places.linears.get(f"{site}.local_experts.{expert}.{own}") for own in (GATED, SECOND))
        for linear in held:
            if linear is not None and leaf in (linear.leaf, *linear.parts):
                names.append(f"{linear.name}.{f'{leaf}_' if leaf in linear.parts else ''}{factor}")
    return names


def _same(group: Sequence[Update]) -> bool:
    _, rank, alpha, tensors = group[0]
    mine = [tensor[:] for tensor in tensors.values()]
    for _, other_rank, other_alpha, others in group[1:]:
        if (other_rank, other_alpha) != (rank, alpha):
            return False
        if not all(torch.equal(one, other[:]) for one, other in zip(mine, others.values())):
            return False
    return True


def _one(name: str, group: Sequence[Update], places: Places) -> Update:
    own, rank, alpha, tensors = group[0]
    if expert_of(own) is None:
        return group[0]
    linears = {key: places.linears[key.rpartition(".")[0]] for key in tensors}
    return name, rank, alpha, {gathered(key, linears[key]): tensor for key, tensor in tensors.items()}
