"""Adapters of a model: what its public methods do to the stack, with artifacts read and checked."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

from graftwork.errors import ArtifactError, ConfigError, MatchError, quoted
from graftwork.models.exchange import theirs
from graftwork.models.exchange.incoming import Arrival, converted
from graftwork.models.exchange.partial import PartialContents
from graftwork.models.pending import Load
from graftwork.models.shape import Shape
from graftwork.parallel.collective import agreed
from graftwork.peft import PEFT
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.entries import named, prompt_formats, transforms
from graftwork.peft.artifact.tensors import Contents, filled
from graftwork.peft.asking import differ
from graftwork.peft.outline import Outline
from graftwork.peft.stack import Stack

log = logging.getLogger(__name__)


def attach(stack: Stack, transforms: Iterable[PEFT], trainable: bool) -> None:
    """Attach ``transforms``, inner to outer, all of them or none; raises MatchError as ``Stack.add`` does."""
    with stack.all_or_nothing():
        for transform in transforms:
            stack.add(transform, trainable)


def seen(path: str | Path) -> str | None:
    """Return the checksum of the adapters at ``path``, ours or Hugging Face's; raises ArtifactError for none."""
    if theirs.recognised(path):
        with theirs.opened(path) as found:
            return found.checksum
    return artifact.read_everywhere(path).checksum


def load(stack: Stack, asked: Load, shape: Shape, identity: Callable[[str | None], artifact.Base]) -> None:
    """Attach the adapters of an artifact with their trained values; those attached already get the values.

    ``identity`` tells what base this is, with a fingerprint of the kind of the given one; an adapter of Hugging Face
    PEFT remembers none, and only has to fit ``shape``. Raises ArtifactError on every rank, and leaves the model as it
    was, when the artifact does not fit.
    """
    if theirs.recognised(asked.path):
        _load_theirs(stack, asked, shape)
        return
    with artifact.opened(asked.path) as held:
        _check_seen(asked, held.config.checksum)
        chosen = agreed(lambda: _checked(stack, asked, held, identity))
        names = [transform.name for transform in chosen]
        contents = agreed(lambda: Contents.of(held.file, held.config, names))
        with attached(stack, chosen, contents, asked.trainable, lambda outlines: _check_order(stack, outlines, held)):
            stack.prompt_formats |= prompt_formats(held.config, names)
            _keep_tasks(stack, chosen)


def _load_theirs(stack: Stack, asked: Load, shape: Shape) -> None:
    """Attach an adapter of Hugging Face PEFT, which has no name of its own: ``asked.names`` may give it one."""
    with theirs.opened(asked.path) as held:
        _check_seen(asked, held.checksum)
        arrival = agreed(lambda: _arrived(stack, asked, held, shape))
        transform = arrival.transform
        contents = (PartialContents if arrival.partial else Contents)(str(held), arrival.tensors, [transform.name])
        with attached(stack, [transform], contents, asked.trainable):
            pass


@contextmanager
def attached(
    stack: Stack,
    chosen: Sequence[PEFT],
    contents: Contents,
    trainable: bool,
    check: Callable[[Sequence[Outline]], None] = lambda outlines: None,
) -> Iterator[None]:
    """Attach and fill transforms around the block, all of them or, when anything raises, none."""
    outlines = stack.outlines(chosen)  # nothing is allocated before the file is known to hold it
    expected = stack.host.everywhere(key for outline in outlines for key in outline.keys)
    agreed(lambda: contents.check(outlines, expected))
    agreed(lambda: check(outlines))
    with stack.all_or_nothing():
        for transform in chosen:
            if transform.name not in stack.transforms:
                stack.add(transform, trainable, loaded=True)
        with filled(stack, contents):
            yield


def _check_seen(asked: Load, checksum: str | None) -> None:
    if asked.checksum not in (None, checksum):
        raise ArtifactError(
            f"Adapter {quoted(asked.path)} is not the one that was there when load_adapters was called; "
            "put that one back, or make the model anew and load this one."
        )


def _arrived(stack: Stack, asked: Load, held: theirs.Theirs, shape: Shape) -> Arrival:
    """Return what a Hugging Face adapter is here, once it fits what is attached."""
    if asked.names is not None and len(asked.names) != 1:
        raise ArtifactError(f"{held} holds one adapter; names takes the one name that it is to have here.")
    arrival = converted(held, shape, asked.names[0] if asked.names else None)
    refuse_long_prompts(prompt_lengths([arrival.transform]), shape.max_position_embeddings)
    _check_free(stack, arrival.transform, str(held))
    if arrival.partial and arrival.transform.name in stack.transforms:
        raise ArtifactError(
            f"The model already has an adapter named {arrival.transform.name!r}, and {held} does not say all of its "
            "values; delete it first."
        )
    return arrival


def _keep_tasks(stack: Stack, loaded: Sequence[PEFT]) -> None:
    """Where prompts got the values of some of their tasks, freeze all that was loaded: only their new tasks train."""
    new = {
        t.name: [task for task in stack.transforms[t.name].tasks or () if task not in (t.tasks or ())] for t in loaded
    }
    if not any(new.values()):
        return
    for name, tasks in new.items():
        stack.freeze(name)
        if tasks:
            stack.train_tasks(name, tasks)


def refuse_long_prompts(lengths: Mapping[str, int], context: int) -> None:
    """Raise ConfigError for a prompt (whose, how many virtual tokens) that leaves no room for a row in the context."""
    for who, length in lengths.items():
        if length >= context:
            raise ConfigError(
                f"{who} has {length:,} virtual tokens, but the model's context holds {context:,} tokens, the row's own "
                f"included; give it at most {context - 1:,}."
            )


def prompt_lengths(transforms: Iterable[PEFT]) -> dict[str, int]:
    """Return the number of virtual tokens of every prompt, and of every task of one."""
    slots = [(transform, slot) for transform in transforms for slot in transform.prompt_slots(0)]
    return {f"{who}{'' if s.task is None else f', task {s.task!r},'}": s.length for who, s in slots}


def refuse_taken_names(transforms: Iterable[PEFT], taken: Iterable[str]) -> None:
    """Raise MatchError for a transform whose name is ``taken`` or that of one before it."""
    names = set(taken)
    for transform in transforms:
        if transform.name in names:
            raise MatchError(
                f"The model already has an adapter named {transform.name!r}; give this "
                f"{type(transform).__name__} another name or delete the other one first."
            )
        names.add(transform.name)


def warn_of_other_prompts(stack: Stack, theirs: Mapping[str, object]) -> None:
    """Warn when rows are put to the model in another way (``theirs``) than its adapters were trained with."""
    for name, trained in stack.prompt_formats.items():
        for key in sorted(theirs.keys() & trained.keys()):
            if differ(theirs[key], trained[key]):
                log.warning("%s is %r, but adapter %r was trained with %r.", key, theirs[key], name, trained[key])


def _checked(
    stack: Stack, asked: Load, held: artifact.Artifact, identity: Callable[[str | None], artifact.Base]
) -> list[PEFT]:
    """Return the transforms to load, once they fit what is attached and the base is the one they were trained on."""
    chosen = named(transforms(held.config, asked.path), asked.names, str(held))
    for loaded in chosen:
        _check_free(stack, loaded, str(held))
    if asked.check_base:
        artifact.check_base(held, identity(held.config.base.fingerprint))
    return chosen


def _check_free(stack: Stack, loaded: PEFT, held: str) -> None:
    attached = stack.transforms.get(loaded.name)
    if attached is not None and not attached.holds(loaded):
        raise ArtifactError(
            f"The model already has another adapter named {loaded.name!r}: {_brief(attached)}, while {held} "
            f"holds {_brief(loaded)}; delete or rename one of them."
        )


def _check_order(stack: Stack, outlines: Sequence[Outline], held: artifact.Artifact) -> None:
    """Raise ArtifactError when two adapters would stand at one module the other way round than when they were saved.

    An adapter at the same module acts on what those inside of it return, so another order is another function.
    """
    loaded = {outline.name: outline.sites for outline in outlines}
    sites = {name: frozenset(stack.sites(name)) for name in stack.transforms} | loaded  # attached ones stay in place
    before = {name: place for place, name in enumerate(held.config.order)}
    for inner, outer in combinations((name for name in sites if name in before), 2):
        shared = sites[inner] & sites[outer]
        if before[inner] > before[outer] and shared and not loaded.keys().isdisjoint((inner, outer)):
            raise ArtifactError(
                f"{held} was saved with {outer!r} inside of {inner!r} at {min(shared)!r}, but here {inner!r} would "
                f"stand inside; delete {inner!r} and load it after {outer!r}."
            )


def _brief(transform: PEFT) -> str:
    return quoted(repr(transform), limit=600, bare=True)
