"""The adapter directory: full, un-sharded tensors and the stack that made them, independent of any layout.

``adapter_model.safetensors`` holds tensors named ``<adapter>.<site>.<tensor>``, ``adapter_config.json`` the stack, the
base it belongs to and a checksum over both files, ``README.md`` a model card. No pickle, no absolute paths.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.compat.collective import agree, broadcast_object
from graftwork.errors import ArtifactError, CheckpointError, GraftworkError
from graftwork.peft.card import model_card
from graftwork.peft.gather import gather_tensors
from graftwork.peft.stack import Stack

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
SCHEMA = 1
TABLE = "table"
"""Name of the baked prompt table, saved beside the encoder that makes it."""


@dataclass(frozen=True)
class Base:
    """What an artifact remembers of its base: family, shape and the fingerprint of its checkpoint (None: random)."""

    name: str
    family: str
    shape: dict[str, Any]
    fingerprint: str | None


def save(
    stack: Stack,
    path: str | Path,
    base: Base,
    names: Sequence[str] | None = None,
    step: int | None = None,
    recipe: str | None = None,
) -> Path:
    """Write the named adapters (default all) to directory ``path`` in one step, from every rank together.

    Raises MatchError for an unknown name and CheckpointError when the disk is full; the previous artifact is then
    intact and no rank goes on.
    """
    chosen = list(stack.transforms) if names is None else list(names)
    for name in chosen:
        stack._known(name)
    tensors = gather_tensors(stack, chosen)
    error: GraftworkError | None = None
    if tensors is not None:
        try:
            _write(Path(path), tensors, _config(stack, chosen, base, step, recipe))
        except GraftworkError as refused:
            error = refused
    agree(error)
    return Path(path)


def read_config(path: str | Path) -> dict[str, Any]:
    """Return ``adapter_config.json`` after checking format, schema and checksum.

    Raises ArtifactError with one sentence that says what is wrong.
    """
    directory = Path(path)
    if not (directory / CONFIG).is_file():
        raise ArtifactError(f"{str(path)!r} is not an adapter: it holds no {CONFIG}.")
    try:
        config = json.loads((directory / CONFIG).read_text())
    except ValueError as error:
        raise ArtifactError(f"{CONFIG} in {str(path)!r} is not valid JSON ({error}); the adapter is damaged.") from error
    if not isinstance(config, dict) or config.get("format") != "graftwork":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        known = f" (a Hugging Face PEFT {kind} adapter)" if kind else ""
        raise ArtifactError(f"{str(path)!r} is not a graftwork adapter{known}; convert it with import-hf.")
    if config.get("schema", 0) > SCHEMA:
        raise ArtifactError(
            f"{str(path)!r} has schema {config['schema']}, newer than the {SCHEMA} this version reads; update graftwork."
        )
    if not (directory / TENSORS).is_file():
        raise ArtifactError(f"{str(path)!r} holds no {TENSORS}; the adapter is incomplete.")
    if config.get("checksum") != _checksum(config, directory / TENSORS):
        raise ArtifactError(
            f"{str(path)!r} is damaged or was changed: its checksum does not match; save or copy the adapter again."
        )
    return config


def check_base(config: Mapping[str, Any], base: Base, path: str | Path) -> None:
    """Raise ArtifactError when the artifact was trained on another base."""
    theirs = config["base"]
    if theirs["shape"] != base.shape:
        fields = [k for k, v in theirs["shape"].items() if base.shape.get(k) != v]
        detail = ", ".join(f"{k} {theirs['shape'][k]} (here {base.shape.get(k)})" for k in fields[:3])
        raise ArtifactError(f"Adapter {str(path)!r} was trained on {theirs['name']}, a model of another shape: {detail}.")
    if theirs["fingerprint"] != base.fingerprint:
        raise ArtifactError(
            f"Adapter {str(path)!r} was trained on {theirs['name']}, whose weights differ from this base "
            f"({base.name}); pass check_base=False (or override_base) to load it all the same."
        )


def fill(stack: Stack, path: str | Path, renamed: Mapping[str, str]) -> None:
    """Copy an artifact's tensors into the attached adapters; each rank reads only its slices.

    ``renamed``: artifact name -> name in the model. Raises ArtifactError on unknown, missing or misshapen tensors and
    on NaN or Inf, on every rank and before any parameter is changed.
    """
    error, values = None, []
    try:
        values = _read(stack, Path(path), renamed)
    except GraftworkError as refused:
        error = refused
    agree(error)
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)


def _read(stack: Stack, path: Path, renamed: Mapping[str, str]) -> list[tuple[Tensor, Tensor]]:
    values: list[tuple[Tensor, Tensor]] = []
    local = {f"{old}.{key}": (new, p) for old, new in renamed.items() for key, p in stack.named_tensors(new)}
    try:
        with safe_open(path / TENSORS, "pt") as file:
            held = set(file.keys())
            _check_names(held, _expected(stack, renamed), path)
            for key, (name, parameter) in local.items():
                source = file.get_slice(key)
                wanted = parameter.sharding.shape  # type: ignore[attr-defined]
                if tuple(source.get_shape()) != tuple(wanted):
                    raise ArtifactError(
                        f"Tensor {key!r} in {str(path)!r} has shape {source.get_shape()}, but the model needs "
                        f"{list(wanted)}."
                    )
                rank, size = _tp_of(stack, name, parameter)
                value = parameter.sharding.read(source, rank, size)  # type: ignore[attr-defined]
                if not torch.isfinite(value).all():
                    raise ArtifactError(f"Tensor {key!r} in {str(path)!r} holds NaN or Inf.")
                values.append((parameter, value))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{TENSORS} in {str(path)!r} cannot be read ({error}); it is truncated.") from error
    return values


def _tp_of(stack: Stack, name: str, parameter: Tensor) -> tuple[int, int]:
    for adapter in stack.adapters(name):
        if any(p is parameter for p in adapter.parameters()):
            return adapter.tp
    raise ArtifactError(f"Adapter {name!r} does not own the tensor that was to be filled.")


def _expected(stack: Stack, renamed: Mapping[str, str]) -> set[str]:
    local = {f"{old}.{key}" for old, new in renamed.items() for key, _ in stack.named_tensors(new)}
    return set(stack.host.everywhere(local))


def _check_names(held: set[str], expected: set[str], path: Path) -> None:
    wanted = {k for k in held if k.rpartition(".")[2] != TABLE}
    unknown, missing = sorted(wanted - expected), sorted(expected - wanted)
    if unknown:
        raise ArtifactError(f"{str(path)!r} holds {len(unknown)} tensors the stack does not have, e.g. {unknown[0]!r}.")
    if missing:
        raise ArtifactError(f"{str(path)!r} lacks {len(missing)} tensors of its stack, e.g. {missing[0]!r}.")


def _write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"The adapter was not saved: tensor {key!r} holds NaN or Inf.")
    with atomic_directory(path) as directory:
        save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
        config["checksum"] = _checksum(config, directory / TENSORS)
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (directory / CARD).write_text(model_card(config, tensors))


def _config(stack: Stack, names: Sequence[str], base: Base, step: int | None, recipe: str | None) -> dict[str, Any]:
    adapters = [
        {"method": type(stack.transforms[n]).__name__, "hyperparameters": stack.transforms[n].hyperparameters()}
        for n in names
    ]
    return {
        "format": "graftwork",
        "peft_type": "GRAFTWORK",
        "schema": SCHEMA,
        "adapters": adapters,
        "base": vars(base),
        "dtype": "float32",
        "step": step,
        "recipe": recipe,
        "versions": {p: _version(p) for p in ("graftwork", "megatron-core", "torch", "lightning", "nemo-run")},
    }


def _checksum(config: Mapping[str, Any], tensors: Path) -> str:
    """Return the SHA-256 of the tensor file followed by the canonical configuration without its checksum."""
    digest = hashlib.sha256()
    with tensors.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    rest = {k: v for k, v in config.items() if k != "checksum"}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def exists(path: str | Path) -> bool:
    """Tell, the same on every rank, whether ``path`` holds an adapter."""
    return bool(broadcast_object((Path(path) / CONFIG).is_file()))
