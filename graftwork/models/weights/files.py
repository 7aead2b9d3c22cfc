"""The safetensors files of a checkpoint directory: which tensor is where, and lazy slices of it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from graftwork.errors import CheckpointError, quoted
from graftwork.jsonfile import named_inside, read_schema, refuse_outside
from graftwork.models.weights.views import PartOfStack, PartView, Stored

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Index(BaseModel):
    """The index of a sharded checkpoint; what else stands in it is not read."""

    weight_map: dict[str, str]


class OpenFile(Protocol):
    """What ``safe_open`` gives: the names in a file, and lazy slices of its tensors."""

    def keys(self) -> list[str]:
        """Names of all tensors."""
        ...

    def get_slice(self, name: str) -> Stored:
        """Return tensor ``name``, nothing read yet."""
        ...


class TensorFiles:
    """Open checkpoint; a context manager. ``files``: tensor name -> file, from the single file or the sharded index.

    A single file wins over an index, as in transformers. ``rename`` gives the name a tensor is known by here (None:
    leave it out). Raises CheckpointError for a directory without safetensors, a damaged file, an index that does not
    say exactly what its files hold, and files outside the directory.
    """

    def __init__(self, directory: str | Path, rename: Callable[[str], str | None] = str) -> None:
        """Read the names of all tensors; no weights are read."""
        self.directory = Path(directory)
        self._stack = ExitStack()
        self._open: dict[Path, OpenFile] = {}
        self.files: dict[str, Path] = {}
        self._stored: dict[str, str] = {}
        self._parts: dict[str, PartOfStack] = {}
        try:
            self._note(self._find(), rename)
        except OSError as error:
            self.close()
            raise CheckpointError(f"{quoted(self.directory)} cannot be read: {error.strerror}.") from error
        except CheckpointError:
            self.close()
            raise

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._open.clear()
        self._stack.close()

    def source(self, name: str) -> Stored:
        """Return a lazy slice of tensor ``name``: indexing it reads only the indexed part."""
        stored = self._handle(self.files[name]).get_slice(self._stored[name])
        return PartView(stored, self._parts[name]) if name in self._parts else stored

    def stored_name(self, name: str) -> str:
        """The tensor's name in its file."""
        return self._stored[name]

    def part(self, name: str) -> PartOfStack | None:
        """The part of the stored tensor that the tensor is, None for the whole."""
        return self._parts.get(name)

    def unstack(self, name: str, parts: Mapping[str, PartOfStack]) -> None:
        """Leave out the stacked tensor ``name``, and know its parts by their names; one that is there twice stays."""
        if self.files.keys() & parts.keys():
            return
        for part, place in parts.items():
            self.files[part], self._stored[part], self._parts[part] = self.files[name], self._stored[name], place
        self.forget(name)

    def forget(self, name: str) -> None:
        """Leave out tensor ``name``."""
        del self.files[name], self._stored[name]

    def _note(self, found: dict[str, Path], rename: Callable[[str], str | None]) -> None:
        for stored, file in found.items():
            name = rename(stored)
            if name is None:
                continue
            if name in self.files:
                raise CheckpointError(
                    f"{quoted(self.directory)} holds one tensor twice, as {quoted(self._stored[name])} and "
                    f"{quoted(stored)}."
                )
            self.files[name], self._stored[name] = file, stored

    def _find(self) -> dict[str, Path]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if single.is_file():
            refuse_outside(self.directory, single, CheckpointError)
            return dict.fromkeys(self._handle(single).keys(), single)
        if index.is_file():
            return self._from_index(index)
        pickled = sorted(p.name for p in self.directory.glob("*.bin"))
        hint = (
            f" (it has {quoted(pickled[0], bare=True)}: save the model again with safe_serialization=True)"
            if pickled
            else ""
        )
        raise CheckpointError(f"{quoted(self.directory)} has neither {SINGLE} nor {INDEX}{hint}.")

    def _from_index(self, index: Path) -> dict[str, Path]:
        refuse_outside(self.directory, index, CheckpointError)
        places = read_schema(index, Index, CheckpointError).weight_map
        what = quoted(index)
        files = {file: named_inside(self.directory, file, what, CheckpointError) for file in set(places.values())}
        missing = sorted(file for file, path in files.items() if not path.is_file())
        if missing:
            raise CheckpointError(f"{what} names files that are not there: {_some(missing)}.")
        self._check_places(what, places, files)
        return {name: files[file] for name, file in places.items()}

    def _check_places(self, what: str, places: dict[str, str], files: dict[str, Path]) -> None:
        """Raise CheckpointError unless the index places every tensor of its files, and nothing else."""
        held = {file: set(self._handle(path).keys()) for file, path in files.items()}
        for name, file in places.items():
            if name not in held[file]:
                raise CheckpointError(f"{what} places {quoted(name)} in {file}, which does not hold it.")
        for file, names in held.items():
            for name in names:
                if places.get(name) != file:
                    raise CheckpointError(f"{file} holds {quoted(name)}, which {what} does not place there.")

    def _handle(self, file: Path) -> OpenFile:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{quoted(file)} is damaged or incomplete: {_first_line(error)}.") from error
        return self._open[file]


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quoted(name, bare=True) for name in names[:limit]) + more


def _first_line(error: Exception) -> str:
    return quoted(str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__, bare=True)
