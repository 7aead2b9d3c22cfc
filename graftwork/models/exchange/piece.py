"""A Hugging Face adapter directory to be: its configuration and its tensors, written one at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.errors import ArtifactError, CheckpointError, quoted
from graftwork.models.exchange.lazy import Lazy
from graftwork.models.weights.writer import Entry, write_file
from graftwork.peft.artifact.directory import CARD, CONFIG, TENSORS
from graftwork.peft.artifact.proof import PROOF

LAYER_PREFIX = "base_model.model."
"""What stands in front of a module's name in a key."""


@dataclass(frozen=True)
class Piece:
    """One adapter by its ``name``, or ``name/task`` for the prompt of a task; ``alone``: the export is no other's."""

    name: str
    config: Mapping[str, object]
    tensors: Mapping[str, Lazy]
    alone: bool = False

    @property
    def place(self) -> str:
        """Its directory inside of the export's, "" for itself."""
        return "" if self.alone else self.name

    @property
    def adapter(self) -> str:
        """The name of the adapter that it is, or is one task of."""
        return self.name.partition("/")[0]

    @property
    def task(self) -> str | None:
        """The task whose prompt it is, None for an adapter without tasks."""
        return self.name.partition("/")[2] or None


def common(task: str, base: str | None) -> dict[str, object]:
    """Return the fields of every Hugging Face adapter."""
    return {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "task_type": task,
    }


@dataclass(frozen=True)
class Staged:
    """Pieces, and the directory where they were written that is not there for others yet."""

    pieces: Sequence[Piece]
    directory: Path


@contextmanager
def staged(path: Path, pieces: Sequence[Piece]) -> Iterator[Staged]:
    """Write the directory ``path`` beside itself, where it stays until the block has ended without an error.

    Raises ArtifactError when something else than exported adapters stands there, CheckpointError when a value is not
    finite or the disk is full; what was there is then intact.
    """
    _check_place(path)
    with atomic_directory(path) as temporary:
        for piece in pieces:
            directory = temporary / piece.place
            directory.mkdir(parents=True, exist_ok=True)
            entries = [Entry(key, lazy.shape, torch.float32) for key, lazy in piece.tensors.items()]
            write_file(directory / TENSORS, entries, _finite(piece.tensors))
            (directory / CONFIG).write_text(json.dumps(piece.config, indent=2, sort_keys=True) + "\n")
        yield Staged(pieces, temporary)


def is_theirs(config: object) -> bool:
    """Tell whether the value of an ``adapter_config.json`` is one of Hugging Face PEFT."""
    return isinstance(config, dict) and isinstance(config.get("peft_type"), str) and "format" not in config


def _finite(tensors: Mapping[str, Lazy]) -> Iterator[Tensor]:
    for key, lazy in tensors.items():
        tensor = lazy[:].float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"The adapter was not exported: tensor {quoted(key)} holds NaN or Inf.")
        yield tensor


def _check_place(path: Path) -> None:
    """Refuse to replace anything but what an export has written: the whole directory would be lost."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(f"{quoted(path)} is a file; name a directory for the exported adapter.")
    for file in path.rglob("*"):
        ours = file.is_dir() or (file.name in (TENSORS, CONFIG, CARD, PROOF) and not file.is_symlink())
        if not ours or (file.name == CONFIG and not is_theirs(_parsed(file))):
            raise ArtifactError(
                f"{quoted(path)} holds {quoted(file.relative_to(path))} and is no exported adapter; name a new one."
            )


def _parsed(file: Path) -> object:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
