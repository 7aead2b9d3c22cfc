"""Pairs of every expert <-> one pair for the parameter that holds them all (``target_parameters``).

For E experts and rank r Hugging Face PEFT has A [E r, inputs], expert after expert, and B [outputs, r E], where the
experts of each column of rank stand together.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from graftwork.models.exchange.lazy import Held, Lazy
from graftwork.models.exchange.low_rank import Pair, alpha_of, one_of, scale_of
from graftwork.models.exchange.piece import LAYER_PREFIX
from graftwork.models.exchange.places import Linear, Places, Stacked

Group = Mapping[int, Pair]
"""The pairs of one expert's linear by the index of its module."""


def stacked(places: Places, pairs: Sequence[Pair], rslora: bool) -> list[Pair]:
    """Return the pairs, those of experts as pairs of parameters, and of what PEFT would take for one of theirs."""
    given = {pair.module: pair for pair in pairs}
    found = [_apart(pair, places) for pair in pairs if not places.modules[pair.module].in_expert]
    groups = {
        stack.name: [{i: given[m] for i, m in enumerate(linear.modules) if m in given} for linear in stack.linears]
        for stack in places.stacks.values()
    }
    used = [places.stacks[name] for name, group in groups.items() if any(group)]
    return found + [
        _together(stack, place, groups[stack.name], rslora) for stack, place in zip(used, nested(used).values())
    ]


def nested(used: Sequence[Stacked]) -> dict[str, str]:
    """Return, by parameter, the module that holds its factors: PEFT wraps a module for each of its parameters."""
    found = {}
    for index, stack in enumerate(used):
        outside = sum(other.module == stack.module for other in used[index + 1 :])
        found[stack.name] = stack.module + ".base_layer" * outside
    return found


def apart(
    stack: Stacked, place: str, rank: int, alpha: float, rslora: bool, held: Held, recent: "Recent"
) -> dict[str, Pair]:
    """Return the pair of every module of a stack's experts; none where both factors of an expert are zero.

    Columns of B that are zero on the rows of one module, in every expert, and not on those of the other, are the
    other's alone.
    """
    count, linear = len(stack.linears), stack.linears[0]
    low = held.take(f"{LAYER_PREFIX}{place}.lora_A.weight", rank * count, linear.inputs)
    high = held.take(f"{LAYER_PREFIX}{place}.lora_B.weight", sum(linear.widths), rank * count)
    A, B = low[:].reshape(count, rank, -1) != 0, high[:].reshape(-1, rank, count) != 0
    kept = _columns([part.any(dim=2).any(dim=0) for part in B.split(linear.widths)])
    alive = A.any(dim=2).any(dim=1) | B.any(dim=1).any(dim=0)
    scale, found = scale_of(rank, alpha, rslora), dict[str, Pair]()
    for expert, own in enumerate(stack.linears):
        for index, module in enumerate(own.modules) if alive[expert] else ():
            width, columns = own.widths[index], kept[index]
            if columns:
                rows = slice(sum(own.widths[:index]), sum(own.widths[: index + 1]))
                first = Lazy((len(columns), own.inputs), partial(_low, recent, low, expert, rank, columns))
                second = Lazy((width, len(columns)), partial(_high, recent, high, expert, rank, columns, rows))
                found[module] = Pair(module, len(columns), alpha_of(len(columns), scale, rslora), first, second)
    return found


class Recent:
    """The last factors that were read whole: the next expert's are in them too."""

    def __init__(self) -> None:
        self._held: list[tuple[Lazy, Tensor]] = []

    def whole(self, factor: Lazy) -> Tensor:
        """Return the values of a factor."""
        for known, value in self._held:
            if known is factor:
                return value
        self._held = [*self._held[-1:], (factor, factor[:])]  # an A and a B
        return self._held[-1][1]


def _low(recent: Recent, factor: Lazy, expert: int, rank: int, columns: list[int]) -> Tensor:
    of_experts: Tensor = recent.whole(factor).unflatten(0, (-1, rank))
    return of_experts[expert, columns]


def _high(recent: Recent, factor: Lazy, expert: int, rank: int, columns: list[int], rows: slice) -> Tensor:
    of_experts: Tensor = recent.whole(factor).unflatten(1, (rank, -1))
    return of_experts[rows, :, expert][:, columns].contiguous()


def _columns(used: Sequence[Tensor]) -> list[list[int]]:
    """Return the columns of every part: those that it alone uses where no column is used by two or none, else all."""
    (rank,) = used[0].shape
    if not (torch.stack(list(used)).sum(dim=0) == 1).all():
        return [list(range(rank))] * len(used)
    return [part.nonzero().flatten().tolist() for part in used]


def _apart(pair: Pair, places: Places) -> Pair:
    if pair.module not in places.mistaken:
        return pair
    return Pair(f"{pair.module}.weight", pair.rank, pair.alpha, pair.A, pair.B, pair.magnitude, place=pair.module)


def _together(stack: Stacked, place: str, groups: Sequence[Group], rslora: bool) -> Pair:
    """Return the pair of a stack: of the largest rank, and of scale 1 where scales or ranks differ."""
    own = [_whole(linear, group, rslora) if group else None for linear, group in zip(stack.linears, groups)]
    there = [pair for pair in own if pair is not None]
    rank, count, linear = max(pair.rank for pair in there), len(own), stack.linears[0]
    same = len({(pair.rank, pair.alpha) for pair in there}) == 1
    scales = [1.0 if pair is None or same else scale_of(pair.rank, pair.alpha, rslora) for pair in own]

    def low() -> Tensor:
        wide = torch.zeros(count, rank, linear.inputs)
        for expert, pair in enumerate(own):
            if pair is not None:
                wide[expert, : pair.rank] = pair.A[:]
        return wide.flatten(0, 1)

    def high() -> Tensor:
        wide = torch.zeros(sum(linear.widths), rank, count)
        for expert, (pair, scale) in enumerate(zip(own, scales)):
            if pair is not None:
                wide[:, : pair.rank, expert] = pair.B[:] * scale
        return wide.flatten(1)

    alpha = there[0].alpha if same else alpha_of(rank, 1.0, rslora)
    shapes = (rank * count, linear.inputs), (sum(linear.widths), rank * count)
    return Pair(stack.name, rank, alpha, Lazy(shapes[0], low), Lazy(shapes[1], high), place=place)


def _whole(linear: Linear, group: Group, rslora: bool) -> Pair:
    """Return the one pair of an expert's linear: with the A that its modules have in common, or the sum of theirs."""
    first, *others = group.values()
    if len(linear.modules) == 1:
        return first
    if len(group) < len(linear.modules) or any(pair.A is not first.A for pair in others):
        return one_of(linear, group, rslora)
    high = Lazy((sum(linear.widths), first.rank), lambda: torch.cat([group[i].B[:] for i in sorted(group)]))
    return Pair(first.module, first.rank, first.alpha, first.A, high)
