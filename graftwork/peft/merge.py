"""Folding adapters into base weights, and giving the weights back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.errors import MatchError
from graftwork.peft.adapter import Adapter
from graftwork.peft.sites import Site
from graftwork.peft.wrapper import AdaptedModule, adapted_modules


@dataclass(frozen=True)
class Candidate:
    """An adapter that is to be merged: its method and name in words, its site, its module."""

    who: str
    site: Site
    adapter: Adapter


@dataclass(frozen=True)
class Folded:
    """New tensors of one base module and the adapters that they contain."""

    wrapper: AdaptedModule
    tensors: dict[str, Tensor]
    adapters: list[Adapter]


def fold(candidates: Sequence[Candidate], chunks: Sequence[nn.Module]) -> list[Folded]:
    """Compute the merged weights, in fp32 and then cast to the base's dtype; adapters merged already are left out.

    Raises MatchError, naming the method, when one cannot be merged or a weight would not be finite.
    """
    for candidate in candidates:
        if not candidate.adapter.mergeable:
            why = candidate.adapter.why_not_mergeable
            raise MatchError(f"{candidate.who} cannot be merged at {candidate.site.name}: {why}.")
    chosen = {id(c.adapter): c for c in candidates if not c.adapter.passive}
    wrappers = [wrapper for chunk in chunks for _, wrapper in adapted_modules(chunk)]
    found = [folded for wrapper in wrappers if (folded := _fold_one(wrapper, chosen))]
    for folded in found:  # not before all are computed: ranks that compute one together must not part
        _check_finite(folded, chosen[id(folded.adapters[0])])
    return found


def install(folded: Sequence[Folded]) -> None:
    """Put merged tensors into their bases, keeping the original ones beside them."""
    for item in folded:
        for key, tensor in item.tensors.items():
            parameter = getattr(item.wrapper.base, key).detach()
            item.wrapper.originals.setdefault(key, parameter.clone())
            parameter.copy_(tensor)
        for adapter in item.adapters:
            adapter.merged = True


def unmerge(chunks: Sequence[nn.Module]) -> None:
    """Restore every merged base weight from its copy, bit for bit."""
    for chunk in chunks:
        for _, wrapper in adapted_modules(chunk):
            for key, tensor in wrapper.originals.items():
                getattr(wrapper.base, key).detach().copy_(tensor)
            wrapper.originals.clear()
            for adapter in wrapper.adapters.values():
                assert isinstance(adapter, Adapter)
                adapter.merged = False


@contextmanager
def original_weights(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Exchange merged weights for the original ones inside the block."""
    wrappers = [wrapper for chunk in chunks for _, wrapper in adapted_modules(chunk)]
    _exchange(wrappers)
    try:
        yield
    finally:
        _exchange(wrappers)


def originals(chunks: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Return the value that each merged parameter, by its id, had before."""
    return {
        id(getattr(wrapper.base, key)): tensor
        for chunk in chunks
        for _, wrapper in adapted_modules(chunk)
        for key, tensor in wrapper.originals.items()
    }


def _exchange(wrappers: Sequence[AdaptedModule]) -> None:
    for wrapper in wrappers:
        for key, held in wrapper.originals.items():
            parameter = getattr(wrapper.base, key).detach()
            wrapper.originals[key] = parameter.clone()
            parameter.copy_(held)


def _fold_one(wrapper: AdaptedModule, chosen: dict[int, Candidate]) -> Folded | None:
    active = list(wrapper.active())
    adapters = [a for a in active if id(a) in chosen]
    if not adapters:
        return None
    first = chosen[id(adapters[0])]
    if active[: len(adapters)] != adapters:
        raise MatchError(f"{first.who} cannot be merged at {first.site.name}: an inner adapter would stay live.")
    weight, bias = getattr(wrapper.base, "weight", None), getattr(wrapper.base, "bias", None)
    if weight is None:
        raise MatchError(
            f"{first.who} cannot be merged at {first.site.name}: its weight is tied to the word embedding's."
        )
    before = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    values: tuple[Tensor, Tensor | None] = weight.detach().float(), None if bias is None else bias.detach().float()
    with torch.no_grad():
        for adapter in adapters:
            values = adapter.merged_weights(*values)
    tensors = {k: v.to(before[k].dtype) for k, v in zip(before, values) if v is not None}
    return Folded(wrapper, tensors, adapters)


def _check_finite(folded: Folded, first: Candidate) -> None:
    for key, tensor in folded.tensors.items():
        if not torch.isfinite(tensor).all():
            raise MatchError(f"{first.who} cannot be merged at {first.site.name}: its {key} would hold NaN or Inf.")
