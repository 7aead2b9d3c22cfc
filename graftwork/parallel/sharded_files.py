"""megatron-core's dist_checkpointing as three calls in which all ranks succeed or all raise the same error.

megatron-core writes some files on the first rank only and lets only that rank know when it could not; the others would
wait for it for ever.
"""

import inspect
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

from graftwork.compat import writer_queue  # accommodations precede any megatron import

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from pydantic import BaseModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from graftwork.errors import CheckpointError, GraftworkError, quoted
from graftwork.jsonfile import read_schema
from graftwork.parallel.collective import agree, agreed, barrier
from graftwork.parallel.tensor_index import DamagedError, indices_as_data
from graftwork.parallel.torch_file import read_torch

T = TypeVar("T")
Entry: TypeAlias = ShardedTensor | ShardedTensorFactory
State = dict[str, Entry]
"""This rank's parts of full tensors, by any name that is this rank's own; ``Entry.key`` names the full tensor."""
MESSAGE = 400
"""So much of what megatron-core and torch say is told."""

_UNREADABLE = (
    CheckpointException,
    CheckpointingException,
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    AssertionError,
    AttributeError,
    TypeError,
    IndexError,
    OverflowError,
    RecursionError,
    MemoryError,
    pickle.UnpicklingError,
)
"""What megatron-core and torch raise for damaged files, also for pickles cut short or of another version."""


def save(state: State, directory: Path) -> None:
    """Write ``state`` into an empty ``directory`` that all ranks see; of equal parts only one is written."""
    _together(lambda: _check_parts(state))
    writer_queue.install()  # with CUDA nothing of megatron-core is changed before it is used
    strategy = _Strategy()
    error: CheckpointError | None = None
    try:
        with _quiet():
            dist_checkpointing.save(dict(state), str(directory), strategy, validate_access_integrity=False)
    except GraftworkError:
        raise  # every rank has it
    except (OSError, RuntimeError) as problem:  # the first rank, before or after the strategy's own part
        if strategy.written:
            barrier()  # where megatron-core holds the other ranks
        error = DamagedError(str(problem))
    agree(error)


def load(state: State, directory: Path) -> dict[str, Tensor]:
    """Return tensors in place of the entries of ``state``, whose own tensors may be overwritten with them."""

    def read() -> dict[str, Tensor]:
        with _quiet(), _as_data(directory):
            found = dist_checkpointing.load(dict(state), str(directory), validate_access_integrity=False)
        assert isinstance(found, dict), "without a strictness level only the state comes back"
        return found

    return _together(read)


def shapes_in(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every full tensor in ``directory``."""

    def read() -> dict[str, tuple[int, ...]]:
        with _quiet(), _as_data(directory):
            found = dist_checkpointing.load_tensors_metadata(str(directory))
        return {key: tuple(tensor.global_shape) for key, tensor in found.items()}

    return _together(read)


def parts_of(entry: Entry) -> list[ShardedTensor]:
    """Return the tensors that ``entry`` is written as: several for a gated fc1."""
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    return built if isinstance(built, list) else list(built.values()) if isinstance(built, dict) else [built]


class _Writer(Protocol):
    """What megatron-core's asynchronous writer does last, on the first rank."""

    finish: Callable[[object, object], None]


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's writer with an agreement of all ranks where it has none."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.written = False
        self._problem: CheckpointError | None = None

    def save(self, sharded_state_dict: dict[str, object], checkpoint_dir: str | Path) -> None:
        """Write the tensors; every rank raises what one has met."""
        agree(None)  # meets the first rank's error when it could not write what precedes the tensors
        with _quiet() as told:
            try:
                super().save(sharded_state_dict, checkpoint_dir)
            except CheckpointException as problem:
                self._problem = DamagedError(_reason(problem))
        # What a writer has met, only its own rank's log tells in every version.
        agree(DamagedError(told[0]) if told and self._problem else None)
        agree(self._problem)
        self.written = True

    def _get_save_and_finalize_callbacks(self, writer: _Writer, *rest: object) -> AsyncRequest:
        finish = writer.finish

        def finish_or_tell(metadata: object, results: object) -> None:
            try:
                finish(metadata, results)
            except OSError as problem:
                self._problem = DamagedError(str(problem))

        writer.finish = finish_or_tell
        return super()._get_save_and_finalize_callbacks(writer, *rest)


def _check_parts(state: State) -> None:
    """Raise when the parts of all ranks do not make up every full tensor exactly once."""
    parts = {f"{name}.{i}": part for name, entry in state.items() for i, part in enumerate(parts_of(entry))}
    validate_sharding_integrity(determine_global_metadata(parts)[1])


@contextmanager
def _as_data(directory: Path) -> Iterator[None]:
    """Read ``directory`` without running anything that a foreign file asks for."""
    read_schema(directory / "metadata.json", _Backends, DamagedError)  # it chooses the code that reads the rest
    _check_common(directory / "common.pt")
    # Newer versions keep indices by path for the life of the process, also when the directory has been written anew.
    getattr(CachedMetadataFileSystemReader, "clear_metadata_cache", lambda: None)()
    with indices_as_data(), _nothing_common():
        yield


@contextmanager
def _nothing_common() -> Iterator[None]:
    """Keep newer versions of megatron-core from unpickling what is no tensor: there is none of it."""
    own = serialization.load_common_state_dict
    setattr(serialization, "load_common_state_dict", lambda *args, **kwargs: {})  # noqa: B010  (it has no option)
    try:
        yield
    finally:
        setattr(serialization, "load_common_state_dict", own)  # noqa: B010


class _Backends(BaseModel):
    """``metadata.json``: what wrote the tensors and what the rest."""

    sharded_backend: Literal["torch_dist"]
    sharded_backend_version: Literal[1] = 1
    common_backend: Literal["torch"] = "torch"
    common_backend_version: Literal[1] = 1


def _check_common(path: Path) -> None:
    """Raise DamagedError unless the file of what is no tensor says that there is nothing; newer versions have none.

    megatron-core 0.16 reads it as torch does by default, which an environment variable turns into running what it says.
    """
    needed = "common_strategy" in inspect.signature(serialization.load).parameters
    if (needed or path.exists()) and read_torch(path, DamagedError) != {}:
        raise DamagedError(f"{path.name} holds more than tensors")


def _together(action: Callable[[], T]) -> T:
    return agreed(action, _UNREADABLE, lambda problem: DamagedError(_reason(problem)))


def _reason(problem: BaseException) -> str:
    """Return the cause of torch's collective exception in place of its table of tracebacks."""
    failures = getattr(problem, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else problem
    first = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
    return quoted(first, MESSAGE, bare=True)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep megatron-core's remarks about its own deprecated calls off the terminal; yield the errors it reports."""
    logger = logging.getLogger("megatron.core.dist_checkpointing")
    handler = _Errors(logging.ERROR)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield handler.messages
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate


class _Errors(logging.Handler):
    """Collects messages."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
