"""Adapters on the disk, ours or Hugging Face PEFT's, opened for a base that is on the disk too."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graftwork.errors import ArtifactError, CheckpointError, quoted
from graftwork.models.exchange import theirs
from graftwork.models.exchange.incoming import converted
from graftwork.models.exchange.lazy import Held, Readable
from graftwork.models.shape import Shape
from graftwork.models.weights import fingerprint, read_config, shape_from_hf
from graftwork.models.weights.hub import HubModel, find, resolve
from graftwork.peft import PEFT
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.entries import named, transforms
from graftwork.peft.artifact.verified import stored_tensors


@dataclass(frozen=True)
class Source:
    """An opened adapter directory: its transforms, inner to outer, and their tensors by full name, not yet read.

    ``directory`` is the base's checkpoint, ``shape`` what its configuration describes; ``partial``: NaN stands where a
    tensor follows from the base.
    """

    where: str
    directory: Path
    shape: Shape
    transforms: Sequence[PEFT]
    tensors: Mapping[str, Readable]
    partial: bool = False

    def held(self, transform: PEFT) -> Held:
        """Return the tensors of one transform, each to be taken once."""
        prefix = f"{transform.name}."
        mine = {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}
        return Held(mine, f"Adapter {transform.name!r}")


@contextmanager
def opened(
    path: str | Path, base: str | Path | None = None, names: Sequence[str] | None = None, check_base: bool = True
) -> Iterator[Source]:
    """Open the named adapters (default all) for ``base``, or for the one that they name, if it is here.

    Raises ArtifactError for a directory that is no adapter, is damaged or belongs to another base, and when the base
    is not named and not here; CheckpointError for a base that cannot be read.
    """
    if theirs.recognised(path):
        with theirs.opened(path) as found:
            if names is not None and len(names) != 1:
                raise ArtifactError(f"{found} holds one adapter; leave names out.")
            directory = _base(found.fields.config.get("base_model_name_or_path"), base, str(found))
            shape = shape_from_hf(read_config(directory))
            arrival = converted(found, shape, names[0] if names else None)
            yield Source(str(found), directory, shape, [arrival.transform], arrival.tensors, arrival.partial)
        return
    with artifact.opened(path) as held:
        chosen = named(transforms(held.config, path), names, str(held))
        directory = _base(held.config.base.name, base, str(held), held.config.base.fingerprint)
        shape = shape_from_hf(read_config(directory))
        if check_base:
            _check_base(held, directory, shape)
        yield Source(str(held), directory, shape, chosen, stored_tensors(held.file))


def _base(name: object, given: str | Path | None, who: str, printed: str | None = None) -> Path:
    """Return the checkpoint that is ``given``, or the one that an adapter names, which is not downloaded."""
    if given is not None:
        return resolve(given)
    if printed is not None and printed.startswith("random:"):
        raise ArtifactError(
            f"Adapter {who} was trained on random weights, which no directory holds; merge it where they are "
            "(merge_adapters, export_hf)."
        )
    try:
        found = find(name) if isinstance(name, str) else None
    except CheckpointError:  # a name that means nothing here
        found = None
    if found is None or isinstance(found, HubModel):
        raise ArtifactError(
            f"Adapter {who} belongs to {quoted(name)}, which is not here; name its checkpoint with base=."
        )
    return found if isinstance(found, Path) else found.make()


def _check_base(held: artifact.Artifact, directory: Path, shape: Shape) -> None:
    """Raise ArtifactError unless an artifact was trained on this checkpoint; its dropout was a choice of training."""
    remembered = held.config.base
    dropout = {field: value for field, value in remembered.shape.items() if field.endswith("_dropout")}
    here = artifact.Base(
        directory.name, shape.family, {**vars(shape), **dropout}, fingerprint(directory, remembered.fingerprint)
    )
    artifact.check_base(held, here)
