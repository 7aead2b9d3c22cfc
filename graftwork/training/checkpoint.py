"""Training state as a directory: everything that resuming needs, written whole or not at all by all ranks together.

``state.json`` (step, layout, index of shards), ``trainer.pt`` (loops, callbacks, schedule, data position),
``shards-*.safetensors`` (trained parameters, moments, fp32 masters), ``random-*.pt`` (generators of each rank).
"""

import json
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.compat.collective import agree, all_gather_objects, broadcast_object
from graftwork.errors import CheckpointError, GraftworkError
from graftwork.training import random_state
from graftwork.training.layout import Layout
from graftwork.training.shards import WEIGHT, Index, Shard, ShardReader, merge_index, tensors_of, trained_shards

STATE, TRAINER = "state.json", "trainer.pt"
FORMAT = 1
ELSEWHERE = ("state_dict", "optimizer_states")
"""Keys of Lightning's checkpoint that are written as shards instead."""


def save(path: Path, checkpoint: dict[str, Any], module: Any, optimizers: list[Any], layout: Layout) -> None:
    """Write Lightning's ``checkpoint`` with the shards of every rank; on any rank's error no rank goes on."""
    with _shared_directory(path) as directory:
        error: GraftworkError | None = None
        index: Index = {}
        try:
            index = _write_rank(directory, module, optimizers)
        except (OSError, RuntimeError, SafetensorError) as problem:
            error = _unwritable(path, problem)
        agree(error)
        index = merge_index(all_gather_objects(index))
        if _rank() == 0:
            try:
                _write_common(directory, checkpoint, index, layout)
            except (OSError, RuntimeError) as problem:
                error = _unwritable(path, problem)
        agree(error)


def read_common(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (Lightning's checkpoint, the contents of ``state.json``); CheckpointError when they cannot be read."""
    try:
        state = json.loads((path / STATE).read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"the training state {str(path)!r} has format {state['format']}, this version reads {FORMAT}."
            )
        checkpoint = torch.load(path / TRAINER, weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, GraftworkError):
            raise
        raise CheckpointError(
            f"the training state {str(path)!r} cannot be read ({error}); "
            "delete that directory to resume from the one before."
        ) from error
    return {**checkpoint, "state_dict": {}, "optimizer_states": [{}]}, state


def read_random_state(path: Path, state: dict[str, Any], layout: Layout) -> random_state.State | None:
    """Return this rank's generators, None when the state was saved in another layout (each rank then starts anew)."""
    if state["layout"] != asdict(layout) or state["world_size"] != _world():
        return None
    return torch.load(path / f"random-{_rank():05}.pt", weights_only=True)


def read_weights(path: Path, state: dict[str, Any], module: Any) -> None:
    """Fill the trained parameters; CheckpointError, on every rank, when they do not fit the model."""
    shards = trained_shards(module)
    error: GraftworkError | None = None
    try:
        with ShardReader(path, state["index"]) as reader:
            loaded = [(shard, reader.read(shard, WEIGHT)) for shard in shards if reader.kinds(shard)]
    except GraftworkError as refused:
        error, loaded = refused, []
    agree(error)
    agree(_left_over(path, state["index"], shards))
    with torch.no_grad():
        for shard, value in loaded:
            shard.parameter.copy_(value)


def read_optimizer(path: Path, state: dict[str, Any], module: Any, optimizer: Any) -> None:
    """Fill ``optimizer``'s state bit for bit; learning rate and other settings stay the recipe's."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    with ShardReader(path, state["index"]) as reader:
        for shard in trained_shards(module):
            if shard.parameter not in held:
                continue
            kinds = [k for k in reader.kinds(shard) if k != WEIGHT]
            optimizer.state[shard.parameter] = {k: _placed(reader.read(shard, k), k, shard) for k in kinds}


def _placed(value: Tensor, kind: str, shard: Shard) -> Tensor:
    # torch keeps the step counter on the CPU.
    return value if kind == "step" else value.to(shard.parameter.device)


def _write_rank(directory: Path, module: Any, optimizers: list[Any]) -> Index:
    torch.save(random_state.capture(), directory / f"random-{_rank():05}.pt")
    file = f"shards-{_rank():05}.safetensors"
    index: Index = {}
    tensors: dict[str, Tensor] = {}
    for shard in trained_shards(module):
        if shard.written_here:
            found = tensors_of(shard, optimizers)
            tensors |= {f"{shard.name}|{kind}": value for kind, value in found.items()}
            index[shard.name] = shard.entry(file, list(found))
    if tensors:
        save_file(tensors, str(directory / file))
    return index


def _write_common(directory: Path, checkpoint: dict[str, Any], index: Index, layout: Layout) -> None:
    kept = {key: value for key, value in checkpoint.items() if key not in ELSEWHERE}
    torch.save(kept, directory / TRAINER)
    state = {
        "format": FORMAT,
        "step": checkpoint["global_step"],
        "layout": asdict(layout),
        "world_size": _world(),
        "index": index,
    }
    (directory / STATE).write_text(json.dumps(state))


@contextmanager
def _shared_directory(path: Path) -> Iterator[Path]:
    """Yield one temporary directory to all ranks; it takes ``path``'s place when every rank has left well."""
    with ExitStack() as stack:
        error: GraftworkError | None = None
        made: Path | None = None
        if _rank() == 0:
            try:
                made = stack.enter_context(atomic_directory(path))
            except GraftworkError as refused:
                error = refused
        agree(error)
        yield Path(broadcast_object(str(made)))


def _left_over(path: Path, index: Index, shards: list[Shard]) -> CheckpointError | None:
    here = {name for names in all_gather_objects([s.name for s in shards]) for name in names}
    extra = sorted(set(index) - here)
    if not extra:
        return None
    return CheckpointError(
        f"the training state {str(path)!r} holds {extra[0]!r} ({len(extra)} such), which the model does not train: "
        "resume with the same recipe, or start anew with resume=False."
    )


def _unwritable(path: Path, problem: Exception) -> CheckpointError:
    return CheckpointError(
        f"the training state {str(path)!r} cannot be written ({problem}); nothing half-written was left and the "
        "state before it is intact."
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
