"""Proofs of merges: a checkpoint that was written answers a probe as base and adapters do, a layer at a time.

How far apart they may be is measured too. Weights that were changed were rounded when they were written, so the written
ones are moved once more, each by up to half of its last place, and the probe tells what that does to the logits.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from graftwork.errors import ArtifactError, quoted
from graftwork.models import proof
from graftwork.models.adapters import attached
from graftwork.models.base import Model
from graftwork.models.exchange.lazy import Lazy, Readable
from graftwork.models.exchange.low_rank import MAGNITUDE, B
from graftwork.models.generation.scoring import evaluating
from graftwork.models.merging.source import Source
from graftwork.models.streamed import Change, as_stored, streamed, trained_on
from graftwork.models.weights import fingerprint, mapping_for, read_config, shape_from_hf
from graftwork.models.weights.load import open_checkpoint, read
from graftwork.parallel.collective import world_size
from graftwork.peft.artifact.directory import Artifact
from graftwork.peft.artifact.proof import Probe, sealed
from graftwork.peft.artifact.tensors import Contents
from graftwork.peft.cuts import Region, Replicated

log = logging.getLogger(__name__)

ROUNDINGS = 4
"""How many times as far as one more rounding moves them logits may be apart: the errors of two are not the same."""


@dataclass(frozen=True)
class Written:
    """A merged checkpoint that is not published yet.

    ``printed``: the fingerprint of what was to be written; ``kept``: tensors of the base that the adapters train;
    ``rounded`` tells of a tensor of ours whether it was rounded to less than fp32.
    """

    directory: Path
    printed: str
    kept: set[str]
    rounded: Callable[[str], bool]


def prove(source: Source, written: Written) -> str | None:
    """Return the text of the proof that a checkpoint is the base of a source with its adapters.

    None, with a warning, in one of several ranks. Raises ArtifactError for files that are not what was to be written,
    and where logits differ by more than roundings explain.
    """
    if world_size() > 1:
        log.warning("The merged model is not verified: this is one of several ranks; run nemorun graft verify later.")
        return None
    assert source.directory is not None, "a source that was opened alone has no weights"
    names = tuple(transform.name for transform in source.transforms)
    with proof.refused("merged"):
        if fingerprint(written.directory) != written.printed:
            raise ArtifactError("the files hold other values than those that were to be written")
        with streamed(source.directory, written.kept) as model, evaluating(model):
            attach(model, source)
            probe = proof.draw(model, names)
            assert probe is not None, "what merges has no virtual tokens"
            live = {view: proof.logits(model, probe, view) for view in ((), names)}
        found = _alone(written, probe, as_stored)
        tolerance = _tolerance(written, probe, found)
        problem = proof.differing(names, live[names], found, tolerance)
        if problem is not None:
            raise problem
        return sealed(proof.proof_of(model, written.printed, probe, live, tolerance))


def _tolerance(written: Written, probe: Probe, found: Tensor) -> float:
    """Return how far apart logits may be: what additions in another order do, and what the roundings explain."""
    usual = proof.TOLERANCES[torch.float32][1]
    mapping = mapping_for(shape_from_hf(read_config(written.directory)), tensor_parallel=1)
    if not any(written.rounded(rule.core) for rule in mapping.expanded()):
        return usual
    moved = _alone(written, probe, partial(nudged, written.rounded))
    return min(usual + ROUNDINGS * proof.distance(moved, found, float(found.abs().max())), 1.0)


def attach(model: Model, source: Source) -> None:
    """Attach the adapters of a source to a model of its base; raises ArtifactError for tensors that do not fit."""
    names = [transform.name for transform in source.transforms]
    mine = {key: held for key, held in source.tensors.items() if key.partition(".")[0] in names}
    tensors = {key: Lazy(tuple(held.shape), partial(_known, source, key, held)) for key, held in mine.items()}
    contents = Contents(source.where, tensors, names)
    with attached(model.stack, source.transforms, contents, trainable=False):
        pass


def nudged(rounded: Callable[[str], bool], name: str, tensor: Tensor) -> Tensor:
    """Return a tensor that was rounded when it was written, moved by up to half of the last place of its dtype."""
    if not rounded(name):
        return tensor
    generator = torch.Generator().manual_seed(proof.SEED)
    _, exponent = torch.frexp(tensor.float())
    last = torch.exp2(exponent.float().sub_(1)).mul_(torch.finfo(tensor.dtype).eps)
    return torch.rand(tensor.shape, generator=generator).sub_(0.5).mul_(last).add_(tensor.float())


def _alone(written: Written, probe: Probe, change: Change) -> Tensor:
    with streamed(written.directory, change=change) as model, evaluating(model):
        return proof.logits(model, probe, ())


def based(source: Source) -> Path | None:
    """Return the base of a source if it is at hand; where it is not, warn that nothing is verified."""
    found = source.directory or trained_on(source.base.fingerprint, source.base.name)
    if found is None or world_size() > 1:
        log.warning(
            "The adapter is not verified: %s, its base, is not at hand here; name its checkpoint with base=.",
            quoted(source.base.name),
        )
        return None
    return found


class Combination:
    """What proves an adapter that was combined of several: as any save, and ``cat`` against the sum of its parts."""

    def __init__(self, combined: Source, directory: Path, parts: Sequence[tuple[float, Source]]) -> None:
        self._combined, self._directory, self._parts = combined, directory, parts

    def __call__(self, names: Sequence[str], written: Artifact | None, gathered: Mapping[str, Tensor]) -> str | None:
        """Return the text of the proof; raises ArtifactError where what was written is not what was combined."""
        with streamed(self._directory) as model:
            attach(model, self._combined)
            text = proof.prove(model, names, written, gathered)
            probe = proof.draw(model, names)
            if self._parts and probe is not None:
                self._compare(model, probe, names)
        return text

    def _compare(self, model: Model, probe: Probe, names: Sequence[str]) -> None:
        with evaluating(model), proof.refused():
            found = proof.logits(model, probe, names)
            parts = [_weighted(source, weight, f"part_{index}") for index, (weight, source) in enumerate(self._parts)]
            for name in names:
                model.delete_adapter(name)
            for part in parts:
                attach(model, part)
            whole = proof.logits(model, probe, [part.transforms[0].name for part in parts])
            problem = proof.differing(names, whole, found, proof.TOLERANCES[torch.float32][1])
            if problem is not None:
                raise ArtifactError(f"it is not the weighted sum of its parts: {problem}")


def _weighted(source: Source, weight: float, name: str) -> Source:
    """Return a source whose one adapter, by another name, adds ``weight`` times what it adds."""
    transform = copy(source.transforms[0])
    before, transform.name = f"{transform.name}.", name
    tensors: dict[str, Readable] = {}
    for key, held in source.tensors.items():
        if key.startswith(before):
            factor = weight if key.endswith(B) else 1.0
            made = partial(lambda held, factor: held[:] * factor, held, factor)
            tensors[f"{name}.{key.removeprefix(before)}"] = Lazy(tuple(held.shape), made)
    return replace(source, transforms=[transform], tensors=tensors)


def _known(source: Source, key: str, held: Readable) -> Tensor:
    """Return a tensor; where Hugging Face PEFT leaves a row's length to the base, with the length that it has there."""
    tensor, (site, _, leaf) = held[:], key.partition(".")[2].rpartition(".")
    if leaf != MAGNITUDE or source.directory is None or not tensor.isnan().any():
        return tensor
    mapping = mapping_for(source.shape, tensor_parallel=1)
    with open_checkpoint(mapping, source.directory) as files:
        weight = read(mapping.rule(f"{site}.weight"), files, 0, 1).float()
    outputs, inputs = weight.shape
    return torch.where(tensor.isnan(), Replicated(inputs, outputs, Region()).norm(weight), tensor)
