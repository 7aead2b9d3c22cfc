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
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.errors import ArtifactError, CheckpointError, suggest
from graftwork.parallel.collective import agreed, all_gather_objects
from graftwork.peft.artifact.card import model_card
from graftwork.peft.artifact.config import ArtifactConfig, Entry
from graftwork.peft.artifact.tensors import TENSORS, bring_together
from graftwork.peft.method import PEFT
from graftwork.peft.methods import METHODS
from graftwork.peft.stack import PromptFormat, Stack

CONFIG, CARD = "adapter_config.json", "README.md"
SCHEMA = 1


@dataclass(frozen=True)
class Base:
    """What an artifact remembers of its base: family, shape and the fingerprint of its checkpoint (None: random)."""

    name: str
    family: str
    shape: dict[str, object]
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
    tensors = bring_together(stack, chosen)

    def write() -> None:
        if tensors is not None:
            _write(Path(path).resolve(), tensors, _config(stack, chosen, base, step, recipe))

    def explain(problem: Exception) -> CheckpointError:
        return CheckpointError(f"The adapter was not saved to {str(path)!r}: {problem}.")

    agreed(write, catch=(OSError, SafetensorError), explain=explain)
    return Path(path)


def read_config(path: str | Path) -> ArtifactConfig:
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
        config = _checked_format(json.loads((directory / CONFIG).read_text()), path)
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


def _checked_format(config: object, path: str | Path) -> ArtifactConfig:
    if not isinstance(config, dict) or config.get("format") != "graftwork":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        known = f" but a Hugging Face PEFT {kind} adapter, which needs import-hf (not in this version)" if kind else ""
        raise ArtifactError(f"{str(path)!r} is no adapter of graftwork{known}.")
    if config.get("schema") not in range(1, SCHEMA + 1):
        raise ArtifactError(
            f"{str(path)!r} has schema {config.get('schema')!r}, but this version reads at most {SCHEMA}; "
            "update graftwork."
        )
    return cast(ArtifactConfig, config)


def read_everywhere(path: str | Path) -> ArtifactConfig:
    """Return ``read_config``; raises ArtifactError on every rank when one cannot read it, or reads another adapter."""
    config = agreed(lambda: read_config(path))
    if len(set(all_gather_objects(config["checksum"]))) > 1:
        raise ArtifactError(f"{str(path)!r} is not the same adapter on every machine; copy one of them to all.")
    return config


def check_base(config: ArtifactConfig, base: Base, path: str | Path) -> None:
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


def transforms(config: ArtifactConfig, path: str | Path) -> list[PEFT]:
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


def prompt_formats(config: ArtifactConfig, names: Sequence[str]) -> dict[str, PromptFormat]:
    """Return, by name, how the named adapters of an artifact were trained to be asked, where that is known."""
    prompts = {str(entry["hyperparameters"]["name"]): entry.get("prompt") for entry in config["adapters"]}
    return {name: dict(prompt) for name in names if (prompt := prompts.get(name))}


def _write(path: Path, tensors: dict[str, Tensor], config: ArtifactConfig) -> None:
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


def _config(stack: Stack, names: Sequence[str], base: Base, step: int | None, recipe: str | None) -> ArtifactConfig:
    adapters: list[Entry] = [
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
        "base": {"name": base.name, "family": base.family, "shape": base.shape, "fingerprint": base.fingerprint},
        "dtype": "float32",
        "step": step,
        "recipe": recipe,
        "versions": {p: _version(p) for p in ("graftwork", "megatron-core", "torch", "lightning", "nemo-run")},
    }


def _checksum(config: Mapping[str, object], tensors: Path) -> str:
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
