"""Proofs of exports: what was written for Hugging Face PEFT is read as anybody's and runs in the live one's place."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from graftwork.errors import ArtifactError, GraftworkError
from graftwork.models import proof
from graftwork.models.exchange import theirs
from graftwork.models.exchange.fields import Config, Fields
from graftwork.models.exchange.incoming import Arrival, converted
from graftwork.models.exchange.lazy import Lazy
from graftwork.models.exchange.piece import Staged
from graftwork.models.generation.scoring import evaluating
from graftwork.models.shape import Shape
from graftwork.parallel.collective import agree, agreed, broadcast_object
from graftwork.peft.artifact.proof import sealed
from graftwork.peft.artifact.rebuilt import fill, groups, unfilled
from graftwork.peft.stack import Grafted
from graftwork.virtual_tokens import PromptLayout


@dataclass(frozen=True)
class Read:
    """What the files of a piece say: configuration, checksum of all of it, whole tensors."""

    config: Config
    checksum: str
    tensors: Mapping[str, Tensor]


def prove(model: proof.Provable, shape: Shape, written: Staged | None) -> dict[str, str]:
    """Return, by the names of pieces, the texts of the proofs that their files are the live adapters; collective.

    ``written`` is the first rank's, ``shape`` the model's. Each is read as any adapter of Hugging
    Face PEFT, built anew, and answers a probe in the place of the live one. One whose rows have no room in the context
    has none. Raises ArtifactError, on every rank, when tensors, modules or logits differ.
    """
    names = broadcast_object(None if written is None else [(p.name, p.adapter, p.task) for p in written.pieces])
    assert names is not None, "the first rank has written the files"
    found = {}
    with evaluating(model), proof.refused("exported"):
        for index, (name, adapter, task) in enumerate(names):
            read = agreed(partial(_read, written, index))
            text = _proved(model, shape, adapter, task, read)
            if text is not None:
                found[name] = text
    return found


def _proved(model: proof.Provable, shape: Shape, name: str, task: str | None, read: Read | None) -> str | None:
    probe = proof.draw(model, [name], task)
    if probe is None:
        return None
    there = _everywhere(read)
    arrival = agreed(lambda: _arrived(shape, name, there))
    items, layout = _newcomer(model, arrival)
    views: list[tuple[str, ...]] = [(), (name,)]
    live = {view: proof.logits(model, probe, view) for view in views}
    fill(model.stack, name, items, {key: lazy[:] for key, lazy in arrival.tensors.items()})
    empty = [key for item in items for key in unfilled(item)]
    agree(ArtifactError(f"tensor {empty[0]!r} is missing") if empty else None)
    probe = probe.model_copy(update={"tasks": [None] * len(probe.tasks)})  # it has no other tasks there
    with model.stack.standing_in({name: items}, layout):
        found = {view: proof.logits(model, probe, view) for view in views}
    _, tolerance = proof.TOLERANCES[model.config.params_dtype]
    for view, logits in found.items():
        agree(proof.differing(view, live[view], logits, tolerance))
    return sealed(proof.proof_of(model, there.checksum, probe, found, tolerance))


def _everywhere(read: Read | None) -> Read:
    """Return on every rank what the first one has read: ranks on other machines need not see its disk."""
    mine = {} if read is None else read.tensors
    about = broadcast_object(None if read is None else (read.config, read.checksum))
    assert about is not None, "the first rank has read it"
    tensors: dict[str, Tensor] = {}
    for group in broadcast_object(groups(mine)):
        tensors |= broadcast_object({key: mine[key] for key in group if key in mine})
    return Read(*about, tensors)


def _read(written: Staged | None, index: int) -> Read | None:
    """Read a piece from its files; raises ArtifactError for tensors that are not those which were to be written."""
    if written is None:
        return None
    piece = written.pieces[index]
    with ExitStack() as held:
        there = theirs.read(written.directory / piece.place, held)
        tensors = {key: stored[:] for key, stored in there.stored.items()}
    strange = sorted(tensors.keys() ^ piece.tensors.keys())
    if strange:
        raise ArtifactError(f"tensor {strange[0]!r} is {'missing' if strange[0] in piece.tensors else 'not known'}")
    for key, lazy in piece.tensors.items():
        if not torch.equal(tensors[key], lazy[:].float()):
            raise ArtifactError(f"tensor {key!r} has other values in the file")
    return Read(there.fields.config, there.checksum, tensors)


def _arrived(shape: Shape, name: str, read: Read) -> Arrival:
    """Return what the files are here; raises ArtifactError where it is not all of an adapter."""
    stored = {key: Lazy(tuple(held.shape), partial(held.__getitem__, ...)) for key, held in read.tensors.items()}
    arrival = converted(theirs.Theirs(Path(), Fields(read.config, "it"), stored, read.checksum), shape, name)
    if arrival.partial:
        raise ArtifactError("it does not hold all values")
    return arrival


def _newcomer(model: proof.Provable, arrival: Arrival) -> tuple[list[Grafted], PromptLayout]:
    try:
        return model.stack.newcomer(arrival.transform)
    except GraftworkError as error:  # on every rank
        raise ArtifactError(str(error)) from error
