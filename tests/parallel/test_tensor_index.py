"""The index of a distributed checkpoint is data: a hostile one runs nothing, one with gaps is refused."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)

from graftwork import parallel
from graftwork.parallel import sharded_files
from graftwork.parallel.tensor_index import DamagedError, read_index

BEFORE = Path(__file__).parents[1] / "written_before" / "adapters" / "checkpoints" / "step-00000003" / "tensors"


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    parallel.ensure_initialized()
    return Path(shutil.copytree(BEFORE, tmp_path / "tensors"))


def own(tensors: Path) -> Metadata:
    return pickle.loads((tensors / ".metadata").read_bytes())


def write(tensors: Path, index: object) -> None:
    (tensors / ".metadata").write_bytes(pickle.dumps(index))


def test_the_index_of_every_earlier_state_is_read_as_pickle_reads_it() -> None:
    for file in BEFORE.parents[2].glob("*/checkpoints/*/tensors/.metadata"):
        assert read_index(file.parent) == pickle.loads(file.read_bytes())


PAYLOADS = {
    "os.system": lambda mark: Runs(os.system, f"touch {mark}"),
    "open": lambda mark: Runs(open, str(mark), "w"),
    "eval": lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    "torch.load": lambda mark: Runs(torch.load, str(mark)),
    "Path.touch": lambda mark: Runs(getattr, Path(mark), "touch"),
}


@pytest.mark.parametrize("where", ["whole", "planner_data", "storage_meta", "size"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_hostile_index_is_refused_and_runs_nothing(payload: str, where: str, tensors: Path, tmp_path: Path) -> None:
    mark, index = tmp_path / "mark", own(tensors)
    hostile: Any = PAYLOADS[payload](mark)
    if where == "whole":
        index = hostile
    elif where == "size":
        next(iter(index.state_dict_metadata.values())).size = hostile  # type: ignore[union-attr]
    else:
        setattr(index, where, hostile)
    write(tensors, index)
    for read in (lambda: sharded_files.shapes_in(tensors), lambda: sharded_files.load({}, tensors)):
        with pytest.raises(DamagedError, match="which no index of tensors needs"):
            read()
    assert not mark.exists()
    if payload == "os.system":  # deliberate break: the payload is one
        pickle.loads((tensors / ".metadata").read_bytes())
        assert mark.exists()


def as_bytes(index: Metadata, key: str) -> None:
    index.state_dict_metadata[key] = BytesStorageMetadata()  # torch would unpickle its value


def outside(index: Metadata, key: str) -> None:
    place = index.storage_data[MetadataIndex(key, index.state_dict_metadata[key].chunks[0].offsets)]  # type: ignore[union-attr]
    place.relative_path = "../__0_0.distcp"


def gap(index: Metadata, key: str) -> None:
    part = index.state_dict_metadata[key].chunks[0]  # type: ignore[union-attr]
    part.sizes = torch.Size([part.sizes[0] - 1, *part.sizes[1:]])


def twice(index: Metadata, key: str) -> None:
    tensor: Any = index.state_dict_metadata[key]
    rows, *rest = tensor.size
    zeros = [0] * len(rest)
    half = torch.Size([rows - 1, *rest])
    tensor.chunks = [ChunkStorageMetadata(torch.Size([o, *zeros]), half) for o in (0, 1)]
    tensor.size = torch.Size([2 * rows - 2, *rest])


def nowhere(index: Metadata, key: str) -> None:
    index.storage_data = {k: v for k, v in index.storage_data.items() if k.fqn != key}


BREAKS = {
    as_bytes: "which is no tensor",
    outside: "names the file '../__0_0.distcp'",
    gap: "do not make it up",
    twice: "lie outside|do not make it up",
    nowhere: "no file is named",
}


@pytest.mark.parametrize("change", BREAKS, ids=lambda f: f.__name__)
def test_what_an_index_says_is_checked(change: Any, tensors: Path) -> None:
    index = own(tensors)
    change(index, next(iter(index.state_dict_metadata)))
    write(tensors, index)
    with pytest.raises(DamagedError, match=BREAKS[change]):
        sharded_files.shapes_in(tensors)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "EOFError|Ran out"), (b"\x80\x04}.", "its index is none"), (b"(" * 200_000 + b".", "."), (b"junk", ".")],
)
def test_what_is_no_index_is_refused(data: bytes, words: str, tensors: Path) -> None:
    (tensors / ".metadata").write_bytes(data)
    with pytest.raises(DamagedError, match=words):
        sharded_files.shapes_in(tensors)


def test_the_code_that_reads_the_tensors_is_not_chosen_by_the_file(tensors: Path) -> None:
    (tensors / "metadata.json").write_text('{"sharded_backend": "zarr", "common_backend": "torch"}')
    with pytest.raises(DamagedError, match="sharded_backend"):
        sharded_files.shapes_in(tensors)


def test_a_directory_written_anew_is_read_anew(tensors: Path) -> None:
    """Some versions of megatron-core keep the index of a path for the life of the process."""
    first = sharded_files.shapes_in(tensors)
    assert sharded_files.load({}, tensors) is not None
    index = own(tensors)
    gap(index, next(iter(index.state_dict_metadata)))
    write(tensors, index)
    assert first
    with pytest.raises(DamagedError, match="do not make it up"):
        sharded_files.load({}, tensors)


def test_what_is_stored_as_bytes_beside_the_tensors_is_left_out(tensors: Path) -> None:
    """Newer versions of megatron-core keep there what is no tensor; torch would unpickle it."""
    index = own(tensors)
    wanted = set(index.state_dict_metadata)
    index.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    write(tensors, index)
    assert set(read_index(tensors).state_dict_metadata) == wanted
