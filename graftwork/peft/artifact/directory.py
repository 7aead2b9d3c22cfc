"""The adapter directory on disk: full, un-sharded tensors and the stack that made them, in no parallel layout.

``adapter_model.safetensors`` holds tensors named ``<adapter>.<site>.<tensor>``, ``adapter_config.json`` the stack, the
base it belongs to and a checksum over both files, ``README.md`` a model card. No pickle, no absolute paths.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.errors import ArtifactError, CheckpointError, GraftworkError, suggest
from graftwork.parallel.collective import agree, all_gather_objects, broadcast_object
from graftwork.peft import METHODS, PEFT
from graftwork.peft.artifact.card import model_card
from graftwork.peft.artifact.gather import gather_tensors
from graftwork.peft.stack import Stack

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
SCHEMA = 1


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

    Raises MatchError for an unknown name, ArtifactError when ``path`` holds anything but an adapter, CheckpointError
    when it cannot be written (disk full) or a value is not finite; what was there is then intact and no rank goes on.
    """
    chosen = stack.known(names)
    if not chosen:
        raise ArtifactError("No adapter was named to be saved; leave names out for all of them.")
    tensors = gather_tensors(stack, chosen)
    error: GraftworkError | None = None
    if tensors is not None:
        try:
            _write(Path(path).resolve(), tensors, _config(stack, chosen, base, step, recipe))
        except GraftworkError as refused:
            error = refused
        except (OSError, SafetensorError) as refused:
            error = CheckpointError(f"The adapter was not saved to {str(path)!r}: {refused}.")
    agree(error)
    return Path(path)


def read_config(path: str | Path) -> dict[str, Any]:
    """Return ``adapter_config.json`` after checking format, schema and checksum.

    Raises ArtifactError with one sentence that says what is wrong.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ArtifactError(f"There is no adapter directory {str(path)!r}.")
    for file in (CONFIG, TENSORS):
        if not (directory / file).is_file():
            raise ArtifactError(f"{str(path)!r} is not an adapter or incomplete: it holds no {file}.")
    try:
        config = json.loads((directory / CONFIG).read_text())
        _check_format(config, path)
        checksum = _checksum(config, directory / TENSORS)
    except ValueError as error:
        raise ArtifactError(f"{CONFIG} in {str(path)!r} is damaged: it is not valid JSON ({error}).") from error
    except OSError as error:
        raise ArtifactError(f"Adapter {str(path)!r} cannot be read: {error.strerror}.") from error
    if config.get("checksum") != checksum:
        raise ArtifactError(
            f"{str(path)!r} is damaged or was changed: its checksum does not match; save or copy the adapter again."
        )
    return config


def _check_format(config: Any, path: str | Path) -> None:
    if not isinstance(config, dict) or config.get("format") != "graftwork":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        known = f" but a Hugging Face PEFT {kind} adapter, which needs import-hf (not in this version)" if kind else ""
        raise ArtifactError(f"{str(path)!r} is no adapter of graftwork{known}.")
    if config.get("schema") not in range(1, SCHEMA + 1):
        raise ArtifactError(
            f"{str(path)!r} has schema {config.get('schema')!r}, but this version reads at most {SCHEMA}; "
            "update graftwork."
        )


def read_everywhere(path: str | Path) -> dict[str, Any]:
    """Return ``read_config``; raises ArtifactError on every rank when one cannot read it, or reads another adapter."""
    config: dict[str, Any] = {}
    error: GraftworkError | None = None
    try:
        config = read_config(path)
    except GraftworkError as refused:
        error = refused
    agree(error)
    if len(set(all_gather_objects(config["checksum"]))) > 1:
        raise ArtifactError(f"{str(path)!r} is not the same adapter on every machine; copy one of them to all.")
    return config


def check_base(config: Mapping[str, Any], base: Base, path: str | Path) -> None:
    """Raise ArtifactError when the artifact was trained on another base."""
    theirs = config["base"]
    fields = [k for k, v in theirs["shape"].items() if base.shape.get(k) != v]
    if fields:
        detail = ", ".join(f"{k} {theirs['shape'][k]} (here {base.shape.get(k)})" for k in fields[:3])
        raise ArtifactError(f"Adapter {str(path)!r} was trained on {theirs['name']}, another shape: {detail}.")
    if theirs["fingerprint"] != base.fingerprint:
        raise ArtifactError(
            f"Adapter {str(path)!r} was trained on {theirs['name']}, whose weights differ from this base "
            f"({base.name}); pass check_base=False to load it all the same."
        )


def transforms(config: Mapping[str, Any], path: str | Path) -> list[PEFT]:
    """Return the stack that an artifact was saved from; raises ArtifactError for a method or option unknown here."""
    found = []
    for entry in config["adapters"]:
        method, options = METHODS.get(entry["method"]), entry["hyperparameters"]
        if method is None:
            raise ArtifactError(f"{str(path)!r} uses method {entry['method']!r}; {suggest(entry['method'], METHODS)}")
        unknown = set(options) - set(inspect.signature(method).parameters)
        if unknown:
            raise ArtifactError(f"{str(path)!r} sets {entry['method']}.{min(unknown)}, unknown here; update graftwork.")
        found.append(method(**options))
    return found


def prompt_formats(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return, by name, how the named adapters of an artifact were trained to be asked, where that is known."""
    entries = {a["hyperparameters"]["name"]: a.get("prompt") for a in config["adapters"]}
    return {name: dict(entries[name]) for name in names if entries.get(name)}


def _write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    _check_place(path)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"The adapter was not saved: tensor {key!r} holds NaN or Inf.")
    with atomic_directory(path) as directory:
        save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
        config["checksum"] = _checksum(config, directory / TENSORS)
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (directory / CARD).write_text(model_card(config, tensors))


def _check_place(path: Path) -> None:
    """Refuse to replace anything but an adapter: the whole directory would be lost."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(f"{str(path)!r} is a file; name a directory for the adapter.")
    strange = sorted({p.name for p in path.iterdir()} - {TENSORS, CONFIG, CARD})
    if strange:
        raise ArtifactError(
            f"{str(path)!r} holds {strange[0]!r} and is no adapter directory; name a new one inside it or elsewhere."
        )


def _config(stack: Stack, names: Sequence[str], base: Base, step: int | None, recipe: str | None) -> dict[str, Any]:
    adapters = [
        {
            "method": type(stack.transforms[n]).__name__,
            "hyperparameters": stack.transforms[n].hyperparameters(),
            "prompt": dict(stack.prompt_formats.get(n, {})),
        }
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
