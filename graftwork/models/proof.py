"""Proofs of artifacts: what the files say is run before it is published, and run again wherever it is loaded."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from graftwork import parallel
from graftwork.errors import ArtifactError
from graftwork.models.generation.protocol import CausalModel
from graftwork.models.generation.scoring import device_of, evaluating, target_logits
from graftwork.parallel.collective import agree, agreed, broadcast_object
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.proof import Probe, Proof, View, read, sealed
from graftwork.peft.artifact.rebuilt import rebuilt
from graftwork.peft.stack import Stack

log = logging.getLogger(__name__)

ROWS, LENGTH, ANSWER, COLUMNS = 2, 16, 4, 16
"""Rows of a probe where there are no tasks, tokens of a row, those of them that are its answer, logits kept of each."""
MOST = 8
"""Most tasks that have a row, and most adapters that have a view of their own."""
SEED = 1234
TOLERANCES = {torch.float32: ("fp32", 1e-4), torch.bfloat16: ("bf16", 1e-1)}
"""How far logits may be apart, relative to the largest: machines and layouts add up in other orders."""


class Provable(CausalModel, Protocol):
    """A causal model with a stack of adapters."""

    @property
    def stack(self) -> Stack:
        """The attached adapters."""
        ...


@dataclass(frozen=True)
class Compared:
    """How far one view of the probe is from what the proof holds, relative to its largest logit.

    adapters: whose view it is, none: the base's; effect: how far it is from the base's; exact: every bit is the same.
    """

    adapters: tuple[str, ...]
    difference: float
    effect: float
    tolerance: float
    exact: bool

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance


def prove(
    model: Provable, names: Sequence[str], written: artifact.Artifact | None, gathered: Mapping[str, Tensor]
) -> str | None:
    """Return the text of the proof that the files of an artifact hold the named adapters as they are; collective.

    Adapters are built anew from the files and stand in the live ones' place while the probe runs. None, with a warning,
    where a row with its virtual tokens has no room in the context. Raises ArtifactError, on every rank, when a tensor,
    an option or the logits differ, or logits are not finite.
    """
    with evaluating(model), refused():
        config = broadcast_object(None if written is None else written.config)
        assert config is not None, "the first rank has written the files"
        probe = draw(model, names)
        if probe is None:
            log.warning("The adapter carries no proof: with its virtual tokens a row has no room in the context.")
            return None
        shown = [tuple(names), *((name,) for name in names[:MOST] if len(names) > 1)]
        live = {view: logits(model, probe, view) for view in [(), *shown]}
        with rebuilt(model.stack, names, config, None if written is None else written.file, gathered):
            found = {(): live[()], **{view: logits(model, probe, view) for view in shown}}
        _, tolerance = TOLERANCES[model.config.params_dtype]
        for view in found:
            agree(differing(view, live[view], found[view], tolerance))
        return sealed(proof_of(model, str(config.checksum), probe, found, tolerance))


def proof_of(
    model: Provable, checksum: str, probe: Probe, found: Mapping[tuple[str, ...], Tensor], tolerance: float
) -> Proof:
    """Return the proof that the files with a checksum make logits [n, vocabulary] of a probe, by the adapters' names.

    The first ones are the base's.
    """
    columns = columns_of(model.shape.vocab_size)
    dtype, _ = TOLERANCES[model.config.params_dtype]
    return Proof(
        artifact=checksum,
        probe=probe,
        columns=columns,
        views=[view_of(names, values, columns) for names, values in found.items()],
        tolerance=tolerance,
        dtype="bf16" if dtype == "bf16" else "fp32",
        device=device_of(model).type,
        layout=asdict(parallel.current_layout()),
        versions=artifact.versions(),
    )


def repeat(model: Provable, path: str | Path) -> list[Compared]:
    """Repeat the probe of the artifact at ``path`` on a model that holds its adapters, in any layout; collective.

    Raises ArtifactError for an artifact without a proof, a damaged one or one that does not fit the model, MatchError
    when an adapter is not attached.
    """
    config = artifact.read_everywhere(path)
    proof = agreed(partial(read, path, config.checksum))
    agreed(partial(check_fits, proof, model.shape.vocab_size, path))
    agreed(lambda: [model.stack.known(view.adapters) for view in proof.views])
    with evaluating(model):
        return [compared(proof, view, logits(model, proof.probe, view.adapters)) for view in proof.views]


def compared(proof: Proof, view: View, whole: Tensor) -> Compared:
    """Return how far logits [n, vocabulary] of a proof's probe are from what one of its views holds."""
    values, wanted = whole[:, proof.columns], torch.tensor(view.values, dtype=torch.float32)
    return Compared(
        adapters=tuple(view.adapters),
        difference=distance(values, wanted, view.scale),
        effect=distance(values, torch.tensor(proof.views[0].values, dtype=torch.float32), view.scale),
        tolerance=proof.tolerance,
        exact=digest(whole) == view.digest,
    )


def draw(model: Provable, names: Sequence[str], task: str | None = None) -> Probe | None:
    """Return the probe of a model: seeded ids, a row for each task; None where the context has no room for a row.

    ``task``: whose rows all are, where it is only about one.
    """
    slots = [slot for slot in model.stack.prompts.slots if slot.name in names]
    every = [slot.task for slot in slots if slot.task is not None] if task is None else [task]
    named = list(dict.fromkeys(every))[:MOST]
    tasks: list[str | None] = [*named] if named else [None]
    tasks *= 1 if len(named) > 1 else ROWS
    longest = max(sum(slot.length for slot in slots if slot.task in (None, task)) for task in tasks)
    length = min(LENGTH, model.shape.max_position_embeddings - longest)
    if length < 2:
        return None
    answer = min(ANSWER, length // 2)
    ids = torch.randint(
        model.shape.vocab_size, (len(tasks), length), generator=torch.Generator().manual_seed(SEED)
    ).tolist()
    return Probe(prompts=[row[:-answer] for row in ids], answers=[row[-answer:] for row in ids], tasks=tasks)


def logits(model: Provable, probe: Probe, names: Sequence[str]) -> Tensor:
    """Return fp32 logits [n, vocabulary] of the probe's answers with the named adapters, equal on every rank."""
    with model.stack.only(names):
        slots = model.stack.layout.slots
        prompts = [
            [*(i for slot in slots if slot.task in (None, task) for i in slot.ids), *row]
            for row, task in zip(probe.prompts, probe.tasks, strict=True)
        ]
        return target_logits(model, model.lay_out(prompts, probe.answers, device_of(model))).cpu()


def columns_of(vocabulary: int) -> list[int]:
    """Return the ids whose logits a proof keeps, evenly over the vocabulary."""
    count = min(COLUMNS, vocabulary)
    return [i * vocabulary // count for i in range(count)]


def view_of(names: Sequence[str], values: Tensor, columns: Sequence[int]) -> View:
    """Return what a proof keeps of logits [n, vocabulary]."""
    kept = values[:, list(columns)].tolist()
    return View(adapters=list(names), digest=digest(values), scale=float(values.abs().max()), values=kept)


def digest(values: Tensor) -> str:
    """Return the SHA-256 of fp32 values."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def distance(first: Tensor, second: Tensor, scale: float) -> float:
    """Return the largest difference relative to ``scale``; infinite for values that are no numbers."""
    found = float((first - second).abs().max()) / max(scale, torch.finfo(torch.float32).tiny)
    return found if found == found else float("inf")


def differing(names: Sequence[str], live: Tensor, found: Tensor, tolerance: float) -> ArtifactError | None:
    """Return what is wrong with logits that were made from files, beside the live ones; None where nothing is."""
    who = " + ".join(names) or "the base"
    if not torch.isfinite(live).all():
        return ArtifactError(f"the logits of {who} on the probe hold NaN or Inf")
    apart = distance(found, live, float(live.abs().max()))
    if apart <= tolerance:
        return None
    return ArtifactError(f"the logits of {who} from the files are {apart:.1e} of the largest away from the live ones")


@contextmanager
def refused(what: str = "saved") -> Iterator[None]:
    """Say of every ArtifactError what it means to who saves, exports or merges."""
    try:
        yield
    except ArtifactError as error:
        reason = str(error).removesuffix(".")
        raise ArtifactError(f"The adapter was not {what}: what was written fails its proof, {reason}.") from error


def check_fits(proof: Proof, vocabulary: int, path: str | Path) -> None:
    """Raise ArtifactError for a probe with ids that are not in a vocabulary."""
    probe = proof.probe
    ids = [i for row in [*probe.prompts, *probe.answers, proof.columns] for i in row]
    if max(ids) >= vocabulary:
        raise ArtifactError(f"The proof of {str(path)!r} has the token id {max(ids)}; valid: 0 to {vocabulary - 1}.")
