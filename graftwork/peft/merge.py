"""Folding adapters into base weights, and giving the weights back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graftwork.errors import MatchError
from graftwork.peft.adapted import AdaptedModule, adapted_modules
from graftwork.peft.adapter import Adapter
from graftwork.peft.match import Site

ORIGINAL = "merged_original"


def merge(chosen: Sequence[tuple[str, Site, Adapter]], chunks: Sequence[nn.Module]) -> None:
    """Fold the chosen (name, site, adapter) into their bases: computed in fp32, cast to the base's dtype.

    Nothing is changed when one of them cannot be merged or a merged weight would not be finite.
    """
    for name, site, adapter in chosen:
        if not adapter.mergeable:
            raise MatchError(f"Adapter {name!r} cannot be merged at {site.name}: {adapter.why_not_mergeable}.")
    ours = {id(adapter) for _, _, adapter in chosen}
    merged = []
    for chunk in chunks:
        for path, wrapper in adapted_modules(chunk):
            folded = _folded(path, wrapper, ours)
            if folded:
                merged.append((wrapper, *folded))
    for wrapper, weights, adapters in merged:
        _install(wrapper, weights, adapters)


def unmerge(chunks: Sequence[nn.Module]) -> None:
    """Restore every merged base weight from its copy, bit for bit."""
    for chunk in chunks:
        for _, wrapper in adapted_modules(chunk):
            original: dict[str, Tensor] | None = wrapper.__dict__.pop(ORIGINAL, None)
            for key, tensor in (original or {}).items():
                with torch.no_grad():
                    getattr(wrapper.base, key).copy_(tensor)
            for adapter in wrapper.adapters.values():
                adapter.merged = False  # type: ignore[assignment]


def _folded(path: str, wrapper: AdaptedModule, ours: set[int]) -> tuple[dict[str, Tensor], list[Adapter]] | None:
    adapters = [a for a in wrapper.active() if id(a) in ours]
    if not adapters:
        return None
    inner = list(wrapper.active())[: len(adapters)]
    if [id(a) for a in inner] != [id(a) for a in adapters]:
        raise MatchError(f"At {path} an adapter inside the merged ones would stay live; merge the inner ones too.")
    weight = getattr(wrapper.base, "weight", None)
    if weight is None:
        raise MatchError(f"Cannot merge at {path}: its weight is tied to the word embedding.")
    bias = getattr(wrapper.base, "bias", None)
    new_weight, new_bias = weight.detach().float(), None if bias is None else bias.detach().float()
    with torch.no_grad():
        for adapter in adapters:
            new_weight, new_bias = adapter.merged_weights(new_weight, new_bias)
    tensors = {"weight": new_weight.to(weight.dtype)}
    if bias is not None and new_bias is not None:
        tensors["bias"] = new_bias.to(bias.dtype)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise MatchError(f"Merging at {path} would put NaN or Inf into its {key}; the base is unchanged.")
    return tensors, adapters


def _install(wrapper: AdaptedModule, tensors: dict[str, Tensor], adapters: list[Adapter]) -> None:
    original = wrapper.__dict__.setdefault(ORIGINAL, {})
    with torch.no_grad():
        for key, tensor in tensors.items():
            parameter = getattr(wrapper.base, key)
            original.setdefault(key, parameter.detach().clone())
            parameter.copy_(tensor)
    for adapter in adapters:
        adapter.merged = True
