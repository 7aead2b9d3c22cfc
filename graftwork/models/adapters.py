"""Adapters of a model: what its public methods do to the stack, with artifacts read and checked."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from graftwork.errors import ArtifactError, MatchError, suggest
from graftwork.models.pending import Load
from graftwork.parallel.collective import agreed
from graftwork.peft import PEFT
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.config import ArtifactConfig
from graftwork.peft.artifact.tensors import fill
from graftwork.peft.stack import Stack

log = logging.getLogger(__name__)


def attach(stack: Stack, transforms: Iterable[PEFT], trainable: bool) -> None:
    """Attach ``transforms``, inner to outer, all of them or none; raises MatchError as ``Stack.add`` does."""
    with stack.all_or_nothing():
        for transform in transforms:
            stack.add(transform, trainable)


def load(stack: Stack, asked: Load, identity: Callable[[], artifact.Base]) -> None:
    """Attach the adapters of an artifact with their trained values; those attached already get the values.

    ``identity`` tells what base this is. Raises ArtifactError on every rank, and leaves the model as it was, when the
    artifact does not fit.
    """
    config = artifact.read_everywhere(asked.path)
    chosen = agreed(lambda: _checked(stack, asked, config, identity))
    names = [transform.name for transform in chosen]
    with stack.all_or_nothing():
        for transform in chosen:
            if transform.name not in stack.transforms:
                stack.add(transform, asked.trainable)
        fill(stack, asked.path, config, names)
        stack.prompt_formats |= artifact.prompt_formats(config, names)


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
            if theirs[key] != trained[key]:
                log.warning("%s is %r, but adapter %r was trained with %r.", key, theirs[key], name, trained[key])


def _checked(stack: Stack, asked: Load, config: ArtifactConfig, identity: Callable[[], artifact.Base]) -> list[PEFT]:
    """Return the transforms to load, once they fit what is attached and the base is the one they were trained on."""
    chosen = _named(artifact.transforms(config, asked.path), asked.names, str(asked.path))
    for loaded in chosen:
        attached = stack.transforms.get(loaded.name)
        if attached is not None and repr(attached) != repr(loaded):
            raise ArtifactError(
                f"The model already has another adapter named {loaded.name!r}: {attached!r}, while {str(asked.path)!r} "
                f"holds {loaded!r}; delete or rename one of them."
            )
    if asked.check_base:
        artifact.check_base(config, identity(), asked.path)
    return chosen


def _named(transforms: Iterable[PEFT], names: Sequence[str] | None, path: str) -> list[PEFT]:
    held = {transform.name: transform for transform in transforms}
    for name in names or ():
        if name not in held:
            raise ArtifactError(f"{path!r} has no adapter {name!r}; {suggest(name, held)}")
    return [held[name] for name in (held if names is None else dict.fromkeys(names))]
