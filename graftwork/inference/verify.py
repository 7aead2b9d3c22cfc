"""verify: a proof's probe run again, here and now, on what carries it or on what was made of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from torch import Tensor

from graftwork.errors import ArtifactError, ConfigError, quoted, suggest
from graftwork.inference import elsewhere
from graftwork.inference.carrier import CHECKPOINT, OURS, THEIRS, Carrier
from graftwork.models import load
from graftwork.models.generation.scoring import evaluating
from graftwork.models.merging.source import opened
from graftwork.models.proof import Compared, check_fits, compared, logits
from graftwork.models.weights import read_config, shape_from_hf
from graftwork.peft.artifact.proof import Probe, Proof, View

CLIENTS = ("graftwork", "transformers")
Runner = Callable[[Probe, Sequence[str]], Tensor]
"""Takes a probe and the names of the adapters that act; returns fp32 logits [n, vocabulary] of the answers."""


@dataclass(frozen=True)
class Verified:
    """What was compared: ``what`` in a sentence, and a row for each view of the probe."""

    what: str
    rows: list[Compared]

    @property
    def ok(self) -> bool:
        """Whether every difference is within its tolerance."""
        return all(row.ok for row in self.rows)


def verify_directory(
    directory: str | Path,
    base: Optional[str] = None,
    against: Optional[str] = None,
    client: str = "graftwork",
    dtype: Optional[str] = None,
) -> Verified:
    """Run the probe of an adapter, an exported adapter or a merged model again; return how far apart the logits are.

    ``against``: another directory, of any of these kinds, that answers the probe instead: is it the same function?
    ``base``: the checkpoint of an adapter, default the one that it names. ``client``: ``transformers`` runs it there,
    with PEFT. ``dtype``: default that of the proof. Raises ArtifactError for what carries no proof, a damaged one, or
    belongs to another base, ConfigError for an unknown client, CheckpointError for a base that cannot be read.
    """
    if client not in CLIENTS:
        raise ConfigError(f"client is {quoted(client)}; {suggest(client, CLIENTS)}")
    source = Carrier.of(directory)
    proof = source.proof()
    target = source if against is None else Carrier.of(against)
    proof, views = _asked(proof, source, target)
    run, name = _runner(target, views, base, client, dtype or proof.dtype, proof)
    what = f"{source.path.name} on {name}, {len(proof.probe.prompts)} rows, {dtype or proof.dtype}"
    if target is not source:
        what += f", against {target.path.name}"
    if client != CLIENTS[0]:
        what += f", in {client}"
    return Verified(what, [compared(proof, view, run(proof.probe, view.adapters)) for view in views])


def _asked(proof: Proof, source: Carrier, target: Carrier) -> tuple[Proof, list[View]]:
    """Return those views of a proof that a target can answer, and the proof with the rows that it has a prompt for."""
    own = proof if target is source else target.own()
    if own is not None:
        proof = proof.model_copy(update={"tolerance": max(own.tolerance, proof.tolerance)})
    base, *others = proof.views
    known = [view.adapters for view in others]
    for name in (name for view in others if target is source and target.kind == OURS for name in view.adapters):
        if name not in target.names:
            raise ArtifactError(f"{target} has no adapter {quoted(name)}; {suggest(name, target.names)}")
    if target.kind == OURS:
        fitting = [base, *(view for view in others if set(view.adapters) <= set(target.names))]
    else:
        wanted = own.views[-1].adapters if own is not None else _named(target, known)
        fitting = [view for view in others if view.adapters == wanted]
        if target.kind == THEIRS and fitting:
            proof, fitting = _of_task(proof, [base, *fitting], target)
    if not any(view.adapters for view in fitting):
        names = ", ".join(" + ".join(adapters) for adapters in known)
        raise ArtifactError(f"{target} is none of the adapters that the proof of {source} is about: {names}.")
    return proof, fitting


def _named(target: Carrier, known: Sequence[list[str]]) -> list[str] | None:
    """Return the adapters that a target without a proof of its own may be, of those that are known."""
    path = target.path.resolve()
    found = [[name] for name in (path.name, path.parent.name) if target.kind == THEIRS and [name] in known]
    return next(iter(found or known), None)


def _of_task(proof: Proof, views: list[View], target: Carrier) -> tuple[Proof, list[View]]:
    """Return a proof of the rows of one task alone, where the others have prompts of their own; the task is no more."""
    tasks = proof.probe.tasks
    if set(tasks) == {None} or target.own() is proof:
        return proof, views
    task = target.path.resolve().name
    kept = [index for index, one in enumerate(tasks) if one in (None, task)]
    if not kept:
        named = ", ".join(sorted({one for one in tasks if one is not None}))
        raise ArtifactError(f"{target} is the prompt of none of the proof's tasks; call its directory one of: {named}.")
    width = len(proof.probe.answers[0])
    lines = [index * width + place for index in kept for place in range(width)]
    few = [v.model_copy(update={"values": [v.values[i] for i in lines], "digest": ""}) for v in views]
    probe = Probe(
        prompts=[proof.probe.prompts[i] for i in kept],
        answers=[proof.probe.answers[i] for i in kept],
        tasks=[None] * len(kept),
    )
    return proof.model_copy(update={"probe": probe, "views": few}), few


def _runner(
    target: Carrier, views: Sequence[View], base: str | None, client: str, dtype: str, proof: Proof
) -> tuple[Runner, str]:
    """Return what answers a probe, and what its base is called."""
    if target.kind == CHECKPOINT:
        directory, name = target.path, target.path.name
    else:
        with opened(target.path, base) as source:
            assert source.directory is not None, "it was asked for"
            directory, name = source.directory, source.base.name
    vocabulary = shape_from_hf(read_config(directory)).vocab_size
    check_fits(proof, vocabulary, target.path)
    if client == CLIENTS[0]:
        return _ours(target, directory, dtype, views), name
    return _theirs(target, directory, dtype, vocabulary), name


def _ours(target: Carrier, directory: Path, dtype: str, views: Sequence[View]) -> Runner:
    model = load(directory, dtype=dtype)
    if target.kind != CHECKPOINT:
        names = views[-1].adapters if target.kind == THEIRS else None
        model.load_adapters(target.path, names=names, trainable=False, check_base=False)  # it was checked

    def run(probe: Probe, names: Sequence[str]) -> Tensor:
        with evaluating(model):
            return logits(model, probe, () if target.kind == CHECKPOINT else names)

    return run


def _theirs(target: Carrier, directory: Path, dtype: str, vocabulary: int) -> Runner:
    if target.kind == OURS:
        raise ArtifactError(
            f"{target} is an adapter of graftwork, which transformers does not know; export or merge it and name that "
            "with against=."
        )
    bare = elsewhere.checkpoint(directory, dtype)

    def run(probe: Probe, names: Sequence[str]) -> Tensor:
        if target.kind == CHECKPOINT or not names:
            return elsewhere.logits(bare, probe, vocabulary)
        # the base is changed in place, and so is asked first
        return elsewhere.logits(elsewhere.adapted(bare, target.path), probe, vocabulary)

    return run
