"""What adapters make of a base's tensors: the arithmetic of ``merge_adapters``, on full tensors and in fp32."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from graftwork.errors import MatchError
from graftwork.models.exchange.lazy import Held, Lazy
from graftwork.models.exchange.low_rank import MAGNITUDE
from graftwork.models.exchange.places import Linear
from graftwork.models.exchange.scales import PART, SCALE
from graftwork.models.merging.source import Source
from graftwork.models.merging.updates import updates_at
from graftwork.models.weights import mapping_for
from graftwork.peft import PEFT
from graftwork.peft.cuts import OUTPUT, Region, Replicated
from graftwork.peft.methods import (
    IA3,
    CanonicalAdapter,
    CanonicalLoRA,
    DoRA,
    LoRA,
    PromptTuning,
    PTuning,
    Selective,
)
from graftwork.peft.methods.dora import EMBEDDING, rescaling
from graftwork.peft.methods.ia3 import NORM, SECOND

LEAVE = "leave it out of names, or serve it here"
UNMERGEABLE: Mapping[type[PEFT], str] = {
    CanonicalAdapter: f"a bottleneck is no change of one weight; {LEAVE}",
    PromptTuning: f"virtual tokens are no change of a weight; {LEAVE}, or export it for Hugging Face PEFT",
    PTuning: f"virtual tokens are no change of a weight; {LEAVE}, or export it for Hugging Face PEFT",
}
"""Methods that are no change of weights, with what to do instead."""


@dataclass(frozen=True)
class Change:
    """What one adapter makes of a linear: ``who`` it is, its new weight of (the weight so far, the base's own).

    ``bias``: the new bias, where it is not the old one. All in fp32, but the base's own weight is as it is stored.
    """

    who: str
    weight: Callable[[Tensor, Tensor], Tensor]
    bias: Callable[[Tensor], Tensor] | None = None


@dataclass
class Changes:
    """What all chosen adapters change: linears by name, inner to outer, and whole tensors by theirs."""

    linears: dict[str, list[Change]] = field(default_factory=dict)
    replaced: dict[str, tuple[str, Lazy]] = field(default_factory=dict)

    def touched(self, core: str) -> list[str]:
        """Return the adapters, in words, that change a tensor of ours."""
        site, _, leaf = core.rpartition(".")
        mine = [c.who for c in self.linears.get(site, ()) if leaf == "weight" or (leaf == "bias" and c.bias)]
        return mine + ([self.replaced[core][0]] if core in self.replaced else [])

    def applied(self, core: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor of ours [outputs, ...] in ``dtype``, as the adapters make it of the base's."""
        wide = max(stored.dtype, dtype, key=lambda one: one.itemsize)  # what a model that holds it would round it to
        own = self.replaced[core][1][:].to(wide) if core in self.replaced else stored
        site, _, leaf = core.rpartition(".")
        value = own.float()
        for change in self.linears.get(site, ()):
            if leaf == "weight":
                value = change.weight(value, own)
            elif leaf == "bias" and change.bias is not None:
                value = change.bias(value)
        return value.to(dtype)


def changes_of(source: Source) -> Changes:
    """Return what the adapters of a source change.

    Raises MatchError, naming method and adapter, for what is no change of weights; ArtifactError for tensors that are
    missing, too many or misshapen.
    """
    for transform in source.transforms:
        if type(transform) not in (*MERGED, Selective):  # what is derived from one of them may compute something else
            why = UNMERGEABLE.get(type(transform), "only its own code knows what it does; merge_adapters may")
            raise MatchError(f"{transform} cannot be merged: {why}.")
    places, found = source.places, Changes()
    for transform in source.transforms:
        held = source.held(transform)
        if isinstance(transform, Selective):
            _replace(transform, source, held, found)
            continue
        for site in dict.fromkeys(name.rpartition(".")[0] for name in held.names):
            _check_site(transform, site, source)
            change = MERGED[type(transform)](transform, places.linear(site), held)
            found.linears.setdefault(site, []).append(change)
        held.finish()
    return found


def _check_site(transform: PEFT, site: str, source: Source) -> None:
    leaf = site.rpartition(".")[2]
    if leaf == EMBEDDING:
        why = f"it stands at {EMBEDDING}, where an update would also change a tied output layer; {LEAVE}"
    elif leaf == OUTPUT and source.shape.tie_embeddings:
        why = f"it stands at {OUTPUT}, whose weight is tied to the word embedding's; {LEAVE}"
    elif leaf == NORM:
        why = f'it scales keys behind {NORM}; train it with key_position="pre_norm", {LEAVE}'
    else:
        return
    raise MatchError(f"{transform} cannot be merged: {why}.")


def _replace(transform: Selective, source: Source, held: Held, found: Changes) -> None:
    mapping = mapping_for(source.shape, tensor_parallel=1)
    for core in held.names:
        shape = mapping.rule(core).op.sharding.shape
        found.replaced[core] = (str(transform), held.take(core, *shape))


def _low_rank(transform: LoRA, linear: Linear, held: Held) -> Change:
    updates = updates_at(transform, linear, held)

    def changed(weight: Tensor, own: Tensor) -> Tensor:
        if updates[0].part is None:
            return weight + updates[0].change()
        parts = linear.parted.write(weight)
        for update in updates:
            assert update.part is not None
            parts[update.part] = parts[update.part] + update.change()
        return linear.parted.join(parts)

    return Change(str(transform), changed)


def _dora(transform: DoRA, linear: Linear, held: Held) -> Change:
    (update,) = updates_at(transform, linear, held)
    outputs = sum(linear.widths)
    lengths = held.take(f"{linear.name}.{MAGNITUDE}", outputs)
    cut = Replicated(linear.inputs, outputs, Region())

    def changed(weight: Tensor, own: Tensor) -> Tensor:
        norm, magnitude = cut.norm(own, (update.high[:] * update.scale, update.low[:])), lengths[:]
        # NaN: Hugging Face PEFT changes nothing in these rows, which keep the length that the base has
        known = torch.where(magnitude.isnan(), cut.norm(own), magnitude)
        return (weight + update.change()) * rescaling(known, norm)[:, None]

    return Change(str(transform), changed)


def _scaled(transform: IA3, linear: Linear, held: Held) -> Change:
    if linear.leaf == SECOND:
        inputs = held.take(f"{linear.name}.{SCALE['ffn']}", linear.inputs)
        return Change(str(transform), lambda weight, own: weight * inputs[:][None, :])
    rows = partial(_row_scale, linear, dict(_vectors(linear, held)))
    return Change(str(transform), lambda weight, own: weight * rows()[:, None], lambda bias: bias * rows())


def _vectors(linear: Linear, held: Held) -> Iterable[tuple[str, Lazy]]:
    for target, part in PART.items():
        if f"{linear.name}.{SCALE[target]}" in held.names:
            count = linear.counts[linear.parts.index(part)]
            yield part, held.take(f"{linear.name}.{SCALE[target]}", count)


def _row_scale(linear: Linear, vectors: Mapping[str, Lazy]) -> Tensor:
    """Return the factor on every row: ones for parts that are not scaled."""
    parts = zip(linear.parts, linear.counts)
    full = torch.cat([vectors[part][:] if part in vectors else torch.ones(count) for part, count in parts])
    inner = linear.parted
    return inner.join([rows.unsqueeze(1) for rows in full.split(linear.counts)]).flatten()


MERGED: Mapping[type[PEFT], Callable[..., Change]] = {
    LoRA: _low_rank,
    CanonicalLoRA: _low_rank,
    DoRA: _dora,
    IA3: _scaled,
}
"""Methods that are a change of linears; Selective is one of whole tensors."""
