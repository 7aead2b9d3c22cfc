"""The safetensors files of a checkpoint directory: which tensor is where, and lazy slices of it."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open

from graftwork.errors import CheckpointError
from graftwork.parallel.sharding import Source

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class OpenFile(Protocol):
    """What ``safe_open`` gives: the names in a file, and lazy slices of its tensors."""

    def keys(self) -> list[str]:
        """Names of all tensors."""
        ...

    def get_slice(self, name: str) -> Source:
        """Return tensor ``name``, nothing read yet."""
        ...


class TensorFiles:
    """Open checkpoint; a context manager. ``files``: tensor name -> file, from the single file or the sharded index.

    ``rename`` gives the name a tensor is known by here (None: leave it out). Raises CheckpointError for a directory
    without safetensors, a shard that the index names but is not there, and a damaged file.
    """

    def __init__(self, directory: str | Path, rename: Callable[[str], str | None] = str) -> None:
        """Read the names of all tensors; no weights are read."""
        self.directory = Path(directory)
        self._stack = ExitStack()
        self._open: dict[Path, OpenFile] = {}
        self.files: dict[str, Path] = {}
        self._stored: dict[str, str] = {}
        for stored, file in self._find().items():
            name = rename(stored)
            if name is not None:
                self.files[name], self._stored[name] = file, stored

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._open.clear()
        self._stack.close()

    def source(self, name: str) -> Source:
        """Return a lazy slice of tensor ``name``: indexing it reads only the indexed part."""
        return self._handle(self.files[name]).get_slice(self._stored[name])

    def stored_name(self, name: str) -> str:
        """The tensor's name in its file."""
        return self._stored[name]

    def _find(self) -> dict[str, Path]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            return self._from_index(index)
        if single.is_file():
            return dict.fromkeys(self._handle(single).keys(), single)
        pickled = sorted(p.name for p in self.directory.glob("*.bin"))
        hint = f" (it has {pickled[0]}: save the model again with safe_serialization=True)" if pickled else ""
        raise CheckpointError(f"{str(self.directory)!r} has neither {SINGLE} nor {INDEX}{hint}.")

    def _from_index(self, index: Path) -> dict[str, Path]:
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{str(index)!r} is not a safetensors index with a weight_map.") from error
        files = {name: self.directory / file for name, file in places.items()}
        missing = sorted({file.name for file in files.values() if not file.is_file()})
        if missing:
            raise CheckpointError(f"{str(index)!r} names files that are not there: {', '.join(missing)}.")
        held = {file: set(self._handle(file).keys()) for file in set(files.values())}
        for name, file in files.items():
            if name not in held[file]:
                raise CheckpointError(f"{str(index)!r} places {name!r} in {file.name}, which does not hold it.")
        return files

    def _handle(self, file: Path) -> OpenFile:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{str(file)!r} is damaged or incomplete: {_first_line(error)}.") from error
        return self._open[file]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
