"""A Hugging Face adapter directory, read once and checked: its fields, and tensors that cannot change any more."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from graftwork.errors import ArtifactError, quoted
from graftwork.jsonfile import parse_json, read_bytes, refuse_outside
from graftwork.models.exchange.fields import Fields
from graftwork.models.exchange.piece import is_theirs
from graftwork.parallel.collective import agreed, all_gather_objects
from graftwork.peft.artifact.directory import CONFIG, MOST_BYTES, TENSORS
from graftwork.peft.artifact.tensors import Shaped
from graftwork.peft.artifact.verified import DTYPES, VerifiedFile, stored_tensors


@dataclass(frozen=True)
class Theirs:
    """An opened adapter of Hugging Face PEFT; ``checksum`` is over all of it."""

    path: Path
    fields: Fields
    stored: Mapping[str, Shaped]
    checksum: str

    def __str__(self) -> str:
        return quoted(self.path)


def recognised(path: str | Path) -> bool:
    """Tell, on every rank alike, whether a directory holds an adapter of Hugging Face PEFT (and not one of ours).

    Raises ArtifactError, on every rank, where machines see different ones.
    """
    found = set(all_gather_objects(_is_theirs(Path(path))))
    if len(found) > 1:
        raise ArtifactError(f"{quoted(path)} is not the same adapter on every machine; copy one of them to all.")
    return found.pop()


@contextmanager
def opened(path: str | Path) -> Iterator[Theirs]:
    """Open a Hugging Face adapter on every rank; close it after the block.

    Raises ArtifactError on every rank when one cannot read it, a field cannot be honoured, or a value is not finite.
    """
    with ExitStack() as held:
        theirs = agreed(lambda: _open(Path(path), held))
        if len(set(all_gather_objects(theirs.checksum))) > 1:
            raise ArtifactError(f"{theirs} is not the same adapter on every machine; copy one of them to all.")
        yield theirs


def _is_theirs(directory: Path) -> bool:
    try:
        return is_theirs(_json(directory))
    except (ArtifactError, OSError, ValueError):
        return False  # whatever it is, the error of an artifact that cannot be read says it


def _open(directory: Path, held: ExitStack) -> Theirs:
    try:
        return read(directory, held)
    except (OSError, ValueError) as error:
        reason = quoted(getattr(error, "strerror", None) or str(error), bare=True)
        raise ArtifactError(f"Adapter {quoted(directory)} cannot be read: {reason}.") from error


def read(directory: Path, held: ExitStack) -> Theirs:
    """Read the adapter in a directory on this rank alone, its file open as long as ``held``; raises as ``opened``."""
    where = f"Adapter {quoted(directory)}"
    config = _json(directory)
    if not isinstance(config, dict):
        raise ArtifactError(f"{where} has a {CONFIG} that is no JSON object.")
    fields = Fields(config, where)
    if not (directory / TENSORS).is_file():
        pickled = sorted(file.name for file in directory.glob("*.bin"))
        hint = f", only {pickled[0]!r}, which may run code; save it again as safetensors" if pickled else ""
        raise ArtifactError(f"{where} is incomplete: it holds no {TENSORS}{hint}.")
    for name in (CONFIG, TENSORS):
        refuse_outside(directory, directory / name, ArtifactError)
    file = VerifiedFile(directory / TENSORS)
    held.callback(file.close)
    stored = stored_tensors(file, tuple(DTYPES))
    for key, tensor in stored.items():
        if not tensor[:].isfinite().all():
            raise ArtifactError(f"Tensor {quoted(key)} in {quoted(directory)} holds NaN or Inf.")
    digest = hashlib.sha256(file.digest.digest() + json.dumps(config, sort_keys=True).encode())
    return Theirs(directory, fields, stored, digest.hexdigest())


def _json(directory: Path) -> object:
    what = f"{CONFIG} in {quoted(directory)} is damaged: it"
    return parse_json(read_bytes(directory / CONFIG, ArtifactError, MOST_BYTES), what, ArtifactError)
