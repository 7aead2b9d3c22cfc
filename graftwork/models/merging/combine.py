"""Several adapters of one base -> one: the weighted sum of their updates, exact, of a lower rank, or by factors.

With update i ``s_i B_i A_i`` and weight w_i: ``cat`` is the sum of all ``w_i s_i B_i A_i``, of the sum of the ranks;
``svd`` the nearest matrix of a lower rank to that sum (Eckart and Young); ``linear`` adds the factors, as Hugging Face
PEFT's ``add_weighted_adapter`` does: ``(sum of c_i B_i) (sum of +-c_i A_i)`` with ``c_i`` the root of ``|w_i s_i|``.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from graftwork.errors import ArtifactError, ConfigError, quoted, suggest
from graftwork.models.cards import describe
from graftwork.models.exchange.low_rank import A, B, patterns
from graftwork.models.exchange.places import Places, shortest
from graftwork.models.exchange.sharing import expert_of, gathered
from graftwork.models.merging.changes import changes_of
from graftwork.models.merging.proved import Combination, based
from graftwork.models.merging.source import Source, opened
from graftwork.models.merging.updates import Update, updates_at
from graftwork.models.merging.write import check_place, known_dtype, write_merged
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.card import NOTHING
from graftwork.peft.method import MOST
from graftwork.peft.methods import CanonicalLoRA, LoRA
from graftwork.peft.methods.lora import unnumbered

Factors = tuple[Tensor, Tensor]
"""A [rank, inputs] and B [outputs, rank] of an update that is not scaled any more."""
Weighted = Sequence[tuple[float, Update]]
"""The updates of one linear, each with its weight times its scale."""


@dataclass(frozen=True)
class Blend:
    """How adapters become one: a weight for each, ``cat``, ``svd`` or ``linear``, and of ``svd`` the rank.

    ``rank`` None: the largest of those at a linear. ``names``: which adapter of each directory, where one holds
    several. ``name``: of the result, default the first one's.
    """

    weights: Sequence[float]
    combine: str = "cat"
    rank: int | None = None
    names: Sequence[str] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.combine not in WAYS:
            raise ConfigError(f"combine is {quoted(self.combine)}; {suggest(str(self.combine), WAYS)}")
        for weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ConfigError(f"weights holds {quoted(weight)}; numbers are valid, negative ones too.")
        if self.rank is None:
            return
        if self.combine != "svd":
            raise ConfigError(f"rank={quoted(self.rank)} counts only with combine='svd', got {self.combine!r}.")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank <= MOST:
            raise ConfigError(f"rank is {quoted(self.rank)}; a whole number from 1 to {MOST:,} is valid.")


def combine_directories(
    adapters: Sequence[str | Path],
    output: str | Path,
    blend: Blend,
    base: str | Path | None = None,
    verify: bool = True,
) -> Path:
    """Write one adapter that is the weighted combination of several, each of ours or of Hugging Face PEFT.

    Only those of Hugging Face PEFT need the base. ``verify``: where the base is at hand, what was written is proved on
    it, and ``cat`` is compared with the sum; where it is not, a warning says so. Raises ConfigError for adapters or
    weights that cannot be combined, ArtifactError for a directory that cannot be read, adapters of different bases,
    where the proof fails or ``output`` holds anything but an adapter, CheckpointError when it cannot be written; what
    was there is then intact.
    """
    with ExitStack() as held:
        sources = _opened(adapters, blend, base, True, held)
        combined = _combined(sources, blend)
        (transform,) = combined.transforms
        tensors = {key: tensor[:].contiguous() for key, tensor in combined.tensors.items()}
        prove = _proving(combined, sources, blend) if verify else None
        prompt, card = combined.prompts.get(transform.name, {}), partial(describe, NOTHING)
        return artifact.put(output, transform, tensors, combined.base, prompt, prove, card)


def merge_combined(
    adapters: Sequence[str | Path],
    output: str | Path,
    blend: Blend,
    base: str | Path | None = None,
    dtype: str | None = None,
    verify: bool = True,
) -> Path:
    """Write the base with the weighted combination of several adapters folded in, as ``merge_directory`` does."""
    wanted = known_dtype(dtype)
    check_place(Path(output))
    with ExitStack() as held:
        combined = _combined(_opened(adapters, blend, base, False, held), blend)
        write_merged(combined, changes_of(combined), Path(output), wanted, verify)
    return Path(output)


def _proving(combined: Source, sources: Sequence[Source], blend: Blend) -> artifact.Prove | None:
    directory = based(combined)
    if directory is None:
        return None
    parts = list(zip(blend.weights, sources)) if blend.combine == "cat" else []
    return Combination(combined, directory, parts)


def _opened(
    adapters: Sequence[str | Path], blend: Blend, base: str | Path | None, alone: bool, held: ExitStack
) -> list[Source]:
    """Open every directory; raises ConfigError unless there is a weight (and a name) for each."""
    if not adapters:
        raise ConfigError("adapters is empty; name at least one adapter directory.")
    for field, given in (("weights", blend.weights), ("names", blend.names)):
        if given is not None and len(given) != len(adapters):
            raise ConfigError(f"{field} has {len(given)} value(s) for {len(adapters)} adapter(s); give one for each.")
    names = [None] * len(adapters) if blend.names is None else [[name] for name in blend.names]
    sources = [held.enter_context(opened(path, base, n, alone=alone)) for path, n in zip(adapters, names)]
    for source in sources:
        if len(source.transforms) > 1:
            there = ", ".join(repr(transform.name) for transform in source.transforms)
            raise ConfigError(
                f"{source.where} holds several adapters ({there}); pick one of each directory with names."
            )
        _check_same_base(sources[0], source)
    return sources


def _check_same_base(first: Source, other: Source) -> None:
    if first.base.fingerprint != other.base.fingerprint or first.base.family != other.base.family:
        raise ArtifactError(
            f"{first.where} and {other.where} belong to different bases ({quoted(first.base.name, bare=True)} and "
            f"{quoted(other.base.name, bare=True)}, whose weights differ); only adapters of one base can be combined."
        )


def _combined(sources: Sequence[Source], blend: Blend) -> Source:
    """Return the combination as the one adapter of a source; raises ConfigError where there is none."""
    method = _method(sources)
    places, found, targets = sources[0].places, dict[str, list[tuple[float, Update]]](), list[str]()
    share = all(_shares(source) for source in sources)
    for weight, source in zip(blend.weights, sources):
        for update in _updates(source, places):
            targets.append(update.name)
            if not (share and expert_of(update.stem)):  # else the same as of expert 0
                found.setdefault(update.stem, []).append((weight * update.scale, update))
    name = blend.name or sources[0].transforms[0].name
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for stem, weighted in found.items():
        low, high = WAYS[blend.combine](weighted, blend)
        _, update = weighted[0]
        ranks[unnumbered(update.name) if share else update.name] = low.shape[0]
        shared = share and expert_of(stem) is not None
        for factor, value in ((A, low.T if update.turned else low), (B, high)):
            key = f"{stem}{factor}"
            tensors[f"{name}.{gathered(key, places.linear(key.rpartition('.')[0])) if shared else key}"] = value
    transform = _transform(
        method, name, ranks, shortest(targets, places.updates(method is CanonicalLoRA)), share, sources
    )
    prompts = [source.prompts.get(source.transforms[0].name, {}) for source in sources]
    same = {name: prompts[0]} if all(prompt == prompts[0] for prompt in prompts) else {}
    return replace(sources[0], transforms=[transform], tensors=tensors, prompts=same)


def _method(sources: Sequence[Source]) -> type[LoRA]:
    """Return the one method of all adapters."""
    transforms = [source.transforms[0] for source in sources]
    for transform in transforms:
        if type(transform) not in (LoRA, CanonicalLoRA):  # what is derived from one may compute something else
            raise ConfigError(
                f"{transform} cannot be combined: it is no sum of low-rank updates; LoRA and CanonicalLoRA can."
            )
        if type(transform) is not type(transforms[0]):
            raise ConfigError(
                f"{transforms[0]} and {transform} cannot be combined: one has a pair of factors for q, k and v "
                "together, the other one for each; merge them one after the other, or train them with one method."
            )
    return LoRA if type(transforms[0]) is LoRA else CanonicalLoRA


def _shares(source: Source) -> bool:
    """Tell whether all experts of a layer have one update in common."""
    (transform,) = source.transforms
    return isinstance(transform, LoRA) and transform.share_experts


def _updates(source: Source, places: Places) -> list[Update]:
    (transform,) = source.transforms
    assert isinstance(transform, LoRA)
    held = source.held(transform)
    sites = dict.fromkeys(name.rpartition(".")[0] for name in held.names)
    updates = [update for site in sites for update in updates_at(transform, places.linear(site), held)]
    held.finish()
    return updates


def _transform(
    method: type[LoRA],
    name: str,
    ranks: Mapping[str, int],
    targets: list[str],
    share: bool,
    sources: Sequence[Source],
) -> LoRA:
    """Return the transform of these ranks; its scale is 1, for theirs went into the factors."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {end: int(value) for end, value in patterns(ranks, rank).items()} or None
    dropouts = {t.dropout for source in sources for t in source.transforms if isinstance(t, LoRA)}
    return method(
        name=name,
        target_modules=targets,
        share_experts=share,
        dim=rank,
        alpha=rank,
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        rank_pattern=others,
        alpha_pattern=others,
    )


def _stacked(weighted: Weighted, blend: Blend) -> Factors:
    """Return the sum exactly: all A on top of each other, all B side by side."""
    low = torch.cat([update.low[:] for _, update in weighted])
    return low, torch.cat([weight * update.high[:] for weight, update in weighted], dim=1)


def _nearest(weighted: Weighted, blend: Blend) -> Factors:
    """Return the nearest sum of the rank, from the factors alone: the dense matrix is never there."""
    low, high = (factor.double() for factor in _stacked(weighted, blend))
    (left, inner), (right, outer) = torch.linalg.qr(high), torch.linalg.qr(low.T)
    U, S, V = torch.linalg.svd(inner @ outer.T, full_matrices=False)
    rank = min(blend.rank or max(update.rank for _, update in weighted), len(S))
    return (V[:rank] @ right.T).float(), (left @ U[:, :rank] * S[:rank]).float()


def _added(weighted: Weighted, blend: Blend) -> Factors:
    """Return the sum of the factors, each times the root of its weight; its sign goes into A."""
    (_, first), *others = weighted
    for _, other in others:
        if other.rank != first.rank:
            raise ConfigError(
                f"combine='linear' adds factors of one rank, but at {first.name} they have {first.rank} and "
                f"{other.rank}; choose combine='cat' or 'svd'."
            )
    roots = [abs(weight) ** 0.5 for weight, _ in weighted]
    signs = [math.copysign(1.0, weight) for weight, _ in weighted]
    low = torch.stack([sign * root * u.low[:] for sign, root, (_, u) in zip(signs, roots, weighted)]).sum(0)
    return low, torch.stack([root * u.high[:] for root, (_, u) in zip(roots, weighted)]).sum(0)


WAYS: Mapping[str, Callable[[Weighted, Blend], Factors]] = {"cat": _stacked, "svd": _nearest, "linear": _added}
"""How updates become one."""
