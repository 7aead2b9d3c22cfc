"""The adapter directory on disk: full, un-sharded tensors and the stack that made them, in no parallel layout.

``adapter_model.safetensors`` holds tensors named ``<adapter>.<site>.<tensor>``, ``adapter_config.json`` the stack, the
base it belongs to and a checksum over both files, ``README.md`` a model card, ``proof.json`` (which loading does not
read) what the adapters made of a small batch. No pickle, no absolute paths.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.errors import ArtifactError, CheckpointError, GraftworkError, quoted
from graftwork.jsonfile import parse_json, read_bytes, refuse_outside, validated
from graftwork.parallel.collective import agreed, all_gather_objects
from graftwork.peft.artifact.card import NOTHING, adapter_card
from graftwork.peft.artifact.config import FORMAT, SCHEMA, ArtifactConfig
from graftwork.peft.artifact.entries import entries_of, entry_of, transforms
from graftwork.peft.artifact.proof import PROOF
from graftwork.peft.artifact.tensors import bring_together
from graftwork.peft.artifact.verified import VerifiedFile
from graftwork.peft.asking import PromptFormat
from graftwork.peft.method import PEFT
from graftwork.peft.stack import Stack

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
MOST_BYTES = 8 * 2**20
"""Largest configuration that is read: it holds a recipe, no tensors."""


@dataclass(frozen=True)
class Base:
    """What an artifact remembers of its base: family, shape and the fingerprint of its checkpoint (None: random)."""

    name: str
    family: str
    shape: dict[str, object]
    fingerprint: str | None


@dataclass(frozen=True)
class Artifact:
    """An adapter directory that was opened and verified: nothing of it is read again from the place it came from."""

    path: Path
    config: ArtifactConfig
    file: VerifiedFile

    def __str__(self) -> str:
        return quoted(self.path)


Prove = Callable[[Sequence[str], Artifact | None, Mapping[str, Tensor]], str | None]
"""Takes the names of what is saved, the files and what was to be in them (on the first rank), on every rank."""


Describe = Callable[[ArtifactConfig, Mapping[str, Tensor], str | None, str], str]
"""Takes what is saved, the text of its proof and the directory's name; returns the text of its card."""


@dataclass(frozen=True)
class Staged:
    """Files of an artifact that is not there yet: where they are, what loading will see, what it will be called."""

    directory: Path
    config: ArtifactConfig
    name: str

    def finish(self, tensors: Mapping[str, Tensor], proof: str | None, describe: Describe) -> None:
        """Put proof and card beside them."""
        if proof is not None:
            (self.directory / PROOF).write_text(proof)
        (self.directory / CARD).write_text(describe(self.config, tensors, proof, self.name), encoding="utf-8")


def plain_card(config: ArtifactConfig, tensors: Mapping[str, Tensor], proof: str | None, place: str) -> str:
    """Return the card of an artifact of which nothing else is known."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return adapter_card(config, shapes, proof, NOTHING, [])


def save(
    stack: Stack,
    path: str | Path,
    base: Base,
    names: Sequence[str] | None = None,
    step: int | None = None,
    recipe: str | None = None,
    prove: Prove | None = None,
    describe: Describe = plain_card,
) -> Path:
    """Write the named adapters (default all) to directory ``path`` in one step, from every rank together.

    ``prove`` sees what was written before anybody else does, and returns the text of the proof; ``describe`` the card,
    on the first rank. Raises what it raises,
    MatchError for an unknown name, ArtifactError when ``path`` holds anything but an adapter, CheckpointError
    when it cannot be written (disk full) or a value is not finite; what was there is then intact and no rank goes on.
    """
    asked = set(stack.known(names))
    chosen = [name for name in stack.transforms if name in asked]  # inner to outer, however they were named
    if not chosen:
        raise ArtifactError("No adapter was named to be saved; leave names out for all of them.")
    tensors = bring_together(stack, chosen)

    def write() -> Staged | None:
        if tensors is None:
            return None
        config = _config(entries_of(stack, chosen), list(stack.transforms), base, step, recipe)
        return staged.enter_context(_staged(Path(path).resolve(), tensors, config))

    def explain(problem: Exception) -> CheckpointError:
        return CheckpointError(f"The adapter was not saved to {quoted(path)}: {quoted(str(problem), bare=True)}.")

    together = partial(agreed, catch=(OSError, ValueError, SafetensorError), explain=explain)
    with ExitStack() as staged:
        files, proof = together(write), None
        if prove is not None:
            with ExitStack() as reading:
                written = together(lambda: None if files is None else _read(files.directory, reading))
                proof = prove(chosen, written, tensors or {})
        together(lambda: None if files is None else files.finish(tensors or {}, proof, describe))
        together(staged.close)
    return Path(path)


def put(
    path: str | Path,
    transform: PEFT,
    tensors: Mapping[str, Tensor],
    base: Base,
    prompt: PromptFormat,
    prove: Prove | None = None,
    describe: Describe = plain_card,
) -> Path:
    """Write one adapter that no model holds to directory ``path`` in one step; ``tensors`` by full name, fp32.

    Raises as ``save`` does.
    """
    config = _config([entry_of(transform, prompt)], [transform.name], base, None, None)
    try:
        with _staged(Path(path).resolve(), tensors, config) as files, ExitStack() as reading:
            proof = prove and prove([transform.name], _read(files.directory, reading), tensors)
            files.finish(tensors, proof, describe)
    except GraftworkError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"The adapter was not saved to {quoted(path)}: {quoted(str(error), bare=True)}."
        ) from error
    return Path(path)


@contextmanager
def opened(path: str | Path) -> Iterator[Artifact]:
    """Open an artifact on every rank, after checking format, schema and checksum; close it after the block.

    Raises ArtifactError on every rank when one cannot read it, or reads another adapter.
    """
    with ExitStack() as held:
        artifact = agreed(lambda: open_here(Path(path), held))
        if len(set(all_gather_objects(artifact.config.checksum))) > 1:
            raise ArtifactError(f"{artifact} is not the same adapter on every machine; copy one of them to all.")
        yield artifact


def read_everywhere(path: str | Path) -> ArtifactConfig:
    """Return what ``opened`` has read of the configuration."""
    with opened(path) as artifact:
        return artifact.config


def check_base(artifact: Artifact, base: Base) -> None:
    """Raise ArtifactError when the artifact was trained on another base."""
    theirs, name = artifact.config.base, quoted(artifact.config.base.name, bare=True)
    fields = [k for k, v in theirs.shape.items() if base.shape.get(k) != v]
    if fields:
        detail = ", ".join(
            f"{quoted(k, bare=True)} {quoted(theirs.shape[k], bare=True)} (here {base.shape.get(k)})"
            for k in fields[:3]
        )
        raise ArtifactError(f"Adapter {artifact} was trained on {name}, another shape: {detail}.")
    if theirs.fingerprint != base.fingerprint:
        raise ArtifactError(
            f"Adapter {artifact} was trained on {name}, whose weights differ from this base "
            f"({base.name}); give the base it was trained on (merge and load_adapters take others with "
            "check_base=False)."
        )


def open_here(directory: Path, held: ExitStack) -> Artifact:
    """Open an artifact on this rank alone, as long as ``held``; raises ArtifactError as ``opened`` does."""
    try:
        return _read(directory, held)
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        reason = quoted(getattr(error, "strerror", None) or str(error), bare=True)
        raise ArtifactError(f"Adapter {quoted(directory)} cannot be read: {reason}.") from error


def _read(directory: Path, held: ExitStack) -> Artifact:
    where = quoted(directory)
    if not directory.is_dir():
        raise ArtifactError(f"There is no adapter directory {where}.")
    for file in (CONFIG, TENSORS):
        if not (directory / file).is_file():
            raise ArtifactError(f"{where} is not an adapter or incomplete: it holds no {file}.")
        refuse_outside(directory, directory / file, ArtifactError)
    raw = _checked_format(_json(directory), where)
    tensors = VerifiedFile(directory / TENSORS)
    held.callback(tensors.close)
    if raw.get("checksum") != _digest(tensors.digest, raw):
        raise ArtifactError(
            f"{where} is damaged or was changed: its checksum does not match; save or copy the adapter again."
        )
    return Artifact(directory, validated(raw, ArtifactConfig, f"{CONFIG} in {where}", ArtifactError), tensors)


def _json(directory: Path) -> object:
    what = f"{CONFIG} in {quoted(directory)} is damaged: it"
    return parse_json(read_bytes(directory / CONFIG, ArtifactError, MOST_BYTES), what, ArtifactError)


def _checked_format(config: object, where: str) -> dict[str, object]:
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        kind = config.get("peft_type") if isinstance(config, dict) else None
        theirs = (
            f" but a Hugging Face PEFT {quoted(kind, bare=True)} adapter: load it with model.load_adapters and save it"
        )
        raise ArtifactError(f"{where} is no adapter of graftwork{theirs if kind else ''}.")
    schema = config.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise ArtifactError(
            f"{where} has schema {quoted(schema)}, but this version reads at most {SCHEMA}; update graftwork."
        )
    return config


@contextmanager
def _staged(path: Path, tensors: Mapping[str, Tensor], config: dict[str, object]) -> Iterator[Staged]:
    """Write the files beside ``path``, where they stay until the block has ended without an error."""
    _check_place(path)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"The adapter was not saved: tensor {key!r} holds NaN or Inf.")
    known = _as_read(config, path)
    with atomic_directory(path) as directory:
        save_file(dict(tensors), directory / TENSORS, metadata={"format": "pt"})
        checked = config | {"checksum": _checksum(config, directory / TENSORS)}
        (directory / CONFIG).write_text(json.dumps(checked, indent=2, sort_keys=True) + "\n")
        yield Staged(directory, known, path.name)


def _as_read(config: Mapping[str, object], path: Path) -> ArtifactConfig:
    """Return the configuration as loading will see it; raises ArtifactError when loading would refuse it."""
    what = f"The adapter was not saved to {quoted(path)}: its configuration"
    try:
        text = json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{what} is no plain data ({quoted(str(error), bare=True)}).") from error
    known = validated(parse_json(text.encode(), what, ArtifactError), ArtifactConfig, what, ArtifactError)
    transforms(known, path)
    return known


def _check_place(path: Path) -> None:
    """Refuse to replace anything but an adapter: the whole directory would be lost."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(f"{str(path)!r} is a file; name a directory for the adapter.")
    strange = sorted({p.name for p in path.iterdir()} - {TENSORS, CONFIG, CARD, PROOF})
    if strange:
        raise ArtifactError(
            f"{str(path)!r} holds {strange[0]!r} and is no adapter directory; name a new one inside it or elsewhere."
        )


def _config(
    entries: Sequence[dict[str, object]], order: Sequence[str], base: Base, step: int | None, recipe: str | None
) -> dict[str, object]:
    return {
        "format": FORMAT,
        "peft_type": "GRAFTWORK",
        "schema": SCHEMA,
        "adapters": list(entries),
        "stack": list(order),
        "base": {"name": base.name, "family": base.family, "shape": base.shape, "fingerprint": base.fingerprint},
        "dtype": "float32",
        "step": step,
        "recipe": recipe,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of what makes an adapter, None for a package that is not there."""
    return {p: _version(p) for p in ("graftwork", "megatron-core", "torch", "lightning", "nemo-run")}


def _checksum(config: Mapping[str, object], tensors: Path) -> str:
    """Return the SHA-256 of the tensor file followed by the canonical configuration without its checksum."""
    with tensors.open("rb") as file:
        return _digest(hashlib.file_digest(file, "sha256"), config)


def _digest(tensors: "hashlib._Hash", config: Mapping[str, object]) -> str:
    digest, rest = tensors.copy(), {k: v for k, v in config.items() if k != "checksum"}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
