"""Adapters on the disk, ours or Hugging Face PEFT's, opened for a base that is on the disk too."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from graftwork.errors import ArtifactError, quoted
from graftwork.models.exchange import theirs
from graftwork.models.exchange.export import shape_of
from graftwork.models.exchange.incoming import converted
from graftwork.models.exchange.lazy import Held, Readable
from graftwork.models.exchange.places import Places
from graftwork.models.exchange.sharing import spread
from graftwork.models.shape import Shape
from graftwork.models.weights import fingerprint, read_config, shape_from_hf
from graftwork.models.weights.hub import at_hand, resolve
from graftwork.peft import PEFT
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.entries import named, prompt_formats, transforms
from graftwork.peft.artifact.verified import stored_tensors
from graftwork.peft.asking import PromptFormat


@dataclass(frozen=True)
class Source:
    """An opened adapter directory: its transforms, inner to outer, and their tensors by full name, not yet read.

    ``directory`` is the base's checkpoint (None where it was not asked for), ``shape`` its shape; ``base`` tells which
    one it is, ``prompts`` how the adapters were trained to be asked, by name.
    """

    where: str
    directory: Path | None
    shape: Shape
    transforms: Sequence[PEFT]
    tensors: Mapping[str, Readable]
    base: artifact.Base
    prompts: Mapping[str, PromptFormat] = field(default_factory=dict)

    def held(self, transform: PEFT) -> Held:
        """Return the tensors of one transform, each to be taken once."""
        prefix = f"{transform.name}."
        mine = {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}
        return Held(spread(mine, self.places), f"Adapter {transform.name!r}")

    @cached_property
    def places(self) -> Places:
        """Where the base's linears are."""
        return Places(self.shape)


@contextmanager
def opened(
    path: str | Path,
    base: str | Path | None = None,
    names: Sequence[str] | None = None,
    check_base: bool = True,
    alone: bool = False,
) -> Iterator[Source]:
    """Open the named adapters (default all) for ``base``, or for the one that they name, if it is here.

    ``alone``: an adapter of ours needs no base unless one is given. Raises ArtifactError for a directory that is no
    adapter, is damaged or belongs to another base, and when the base is not named and not here; CheckpointError for a
    base that cannot be read.
    """
    if theirs.recognised(path):
        with theirs.opened(path) as found:
            yield _theirs(found, base, names)
        return
    with artifact.opened(path) as held:
        chosen = named(transforms(held.config, path), names, str(held))
        remembered = held.config.base
        identity = artifact.Base(remembered.name, remembered.family, dict(remembered.shape), remembered.fingerprint)
        directory = None
        if base is not None or not alone:
            directory = _directory(remembered.name, base, str(held), remembered.fingerprint)
        shape = shape_of(held.config.base, str(held)) if directory is None else shape_from_hf(read_config(directory))
        if directory is not None and check_base:
            _check_base(held, directory, shape)
        prompts = prompt_formats(held.config, [transform.name for transform in chosen])
        yield Source(str(held), directory, shape, chosen, stored_tensors(held.file), identity, prompts)


def _theirs(found: theirs.Theirs, base: str | Path | None, names: Sequence[str] | None) -> Source:
    if names is not None and len(names) != 1:
        raise ArtifactError(f"{found} holds one adapter; leave names out.")
    directory = _directory(found.fields.config.get("base_model_name_or_path"), base, str(found))
    shape = shape_from_hf(read_config(directory))
    arrival = converted(found, shape, names[0] if names else None)
    identity = artifact.Base(
        directory.name if base is None or Path(base).exists() else str(base),
        shape.family,
        dict(sorted(vars(shape).items())),
        fingerprint(directory),
    )
    return Source(str(found), directory, shape, [arrival.transform], arrival.tensors, identity)


def _directory(name: object, given: str | Path | None, who: str, printed: str | None = None) -> Path:
    """Return the checkpoint that is ``given``, or the one that an adapter names, which is not downloaded."""
    if given is not None:
        return resolve(given)
    if printed is not None and printed.startswith("random:"):
        raise ArtifactError(
            f"Adapter {who} was trained on random weights, which no directory holds; merge it where they are "
            "(merge_adapters, export_hf)."
        )
    found = at_hand(name) if isinstance(name, str) else None
    if found is None:
        raise ArtifactError(
            f"Adapter {who} belongs to {quoted(name)}, which is not here; name its checkpoint with base=."
        )
    return found


def _check_base(held: artifact.Artifact, directory: Path, shape: Shape) -> None:
    """Raise ArtifactError unless an artifact was trained on this checkpoint; its dropout was a choice of training."""
    remembered = held.config.base
    dropout = {field: value for field, value in remembered.shape.items() if field.endswith("_dropout")}
    here = artifact.Base(
        directory.name, shape.family, {**vars(shape), **dropout}, fingerprint(directory, remembered.fingerprint)
    )
    artifact.check_base(held, here)
