"""What trains as megatron-core's sharded state: weights under their own keys, moments and masters beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn
from torch.optim import Optimizer

from graftwork import parallel
from graftwork.errors import CheckpointError
from graftwork.parallel.collective import all_gather_objects
from graftwork.parallel.flat_range import flat_range
from graftwork.parallel.sharded_files import Entry, State, load, parts_of, shapes_in
from graftwork.training.optimizer.bucket import Piece

OPTIMIZER = "optimizer.state."
"""How megatron-core's own checkpoints begin the keys of an optimizer's tensors."""
MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
AGAIN = "resume with the same recipe, or start anew with resume=False."
Pieces: TypeAlias = Mapping[nn.Parameter, Sequence[Piece]]
"""What this rank's optimizers step of parameters that are shared out over data-parallel ranks."""


class HoldsModule(Protocol):
    """Holds this rank's megatron-core module, or a list of virtual pipeline stages, as ``module``."""

    @property
    def module(self) -> object:
        """The module or modules; None before the model is built."""
        ...


def chunks_of(model: HoldsModule) -> list[nn.Module]:
    """Return this rank's model chunks: one, or one per virtual pipeline stage."""
    inner = model.module
    found = list(inner) if isinstance(inner, nn.ModuleList | list) else [inner]
    return [chunk for chunk in found if isinstance(chunk, nn.Module)]


def trained(chunks: Sequence[nn.Module]) -> dict[str, tuple[nn.Parameter, Entry]]:
    """Return what trains on this rank in ``chunks``, with its place."""
    # Each layer and each expert has a key of its own: adapters may stand in, and train, only some of them.
    metadata = {"dp_cp_group": parallel.dp_group(with_context_parallel=True), "singleton_local_shards": True}
    found: dict[str, tuple[nn.Parameter, Entry]] = {}
    for index, chunk in enumerate(chunks):
        parameters = {n: p for n, p in chunk.named_parameters() if p.requires_grad}
        entries = sharded_state_dict_default(chunk, "", metadata=metadata)
        lost = sorted(set(parameters) - set(entries))
        if lost:
            raise CheckpointError(f"{lost[0]!r} ({len(lost)} such) trains but has no sharded state to be saved.")
        found |= {f"{index}/{n}": (p, entries[n]) for n, p in parameters.items()}
    return found


def state_to_save(chunks: Sequence[nn.Module], optimizers: Sequence[Optimizer], pieces: Pieces) -> State:
    """Return the sharded state of what trains in ``chunks`` and of ``optimizers``."""
    state: State = {}
    for name, (parameter, entry) in trained(chunks).items():
        state[name] = entry
        for start, stepped in _stepped(parameter, pieces):
            for kind, value in _tensors(stepped, optimizers).items():
                if kind != "step":
                    state |= _placed(f"{name}/{kind}", entry, kind, value, None if stepped is parameter else start)
    return state


def steps_made(chunks: Sequence[nn.Module], optimizers: Sequence[Optimizer], pieces: Pieces) -> float:
    """Return the number of steps that every trained parameter has made; all ranks must call this together."""
    parameters = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    stepped = [one for p in parameters for _, one in _stepped(p, pieces)]
    mine = {float(_tensors(one, optimizers).get("step", 0.0)) for one in stepped}
    steps = sorted({step for found in all_gather_objects(mine) for step in found})
    if len(steps) > 1:
        raise CheckpointError(f"parameters have made different numbers of steps ({steps}), which no state can hold.")
    return steps[0] if steps else 0.0


def load_weights(chunks: Sequence[nn.Module], directory: Path, name: str) -> None:
    """Fill what trains from the state ``name``; CheckpointError on every rank when it does not fit the model."""
    places = trained(chunks)
    state = {key: entry for key, (_, entry) in places.items()}
    _check_fit(state, directory, name, optimizer=False)
    loaded = load(state, directory)
    with torch.no_grad():
        for key, (parameter, _) in places.items():
            parameter.copy_(loaded[key])


def load_optimizer(
    chunks: Sequence[nn.Module], optimizer: Optimizer, pieces: Pieces, step: float, directory: Path, name: str
) -> None:
    """Fill ``optimizer``'s state bit for bit; learning rate and other settings stay the recipe's."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    state: State = {}
    filled: dict[nn.Parameter, dict[str, Tensor]] = {}
    for key, (parameter, entry) in trained(chunks).items():
        for start, stepped in ((a, one) for a, one in _stepped(parameter, pieces) if one in held):
            filled[stepped] = {kind: torch.zeros_like(stepped, dtype=torch.float32) for kind in _kinds(parameter)}
            for kind, value in filled[stepped].items():
                state |= _placed(f"{key}/{kind}", entry, kind, value, None if stepped is parameter else start)
    _check_fit(state, directory, name, optimizer=True)
    into = {key: entry.data for key, entry in state.items()}
    loaded = load(state, directory)
    for key, place in into.items():
        assert place is not None
        place.copy_(loaded[key])
    for stepped, tensors in filled.items():
        optimizer.state[stepped] |= {"step": torch.tensor(step), **tensors}  # torch keeps the step on the CPU


def _stepped(parameter: nn.Parameter, pieces: Pieces) -> list[tuple[int, nn.Parameter]]:
    """Return what this rank steps of a parameter, with the place of each in it: itself, or pieces of it, or nothing."""
    if parameter not in pieces:
        return [(0, parameter)]
    return [(piece.start, piece.parameter) for piece in pieces[parameter]]


def _placed(name: str, entry: Entry, kind: str, value: Tensor, start: int | None) -> State:
    """Describe ``value``, a moment or master of the tensor that ``entry`` places, or of a piece that begins there."""
    if start is None:
        return {name: make_sharded_optimizer_tensor(entry, value, OPTIMIZER + kind)}
    assert entry.data is not None
    local = torch.empty(entry.data.shape, dtype=value.dtype, device="meta")
    whole = make_sharded_optimizer_tensor(entry, local, OPTIMIZER + kind)
    return {f"{name}/{start}.{index}": part for index, part in enumerate(flat_range(whole, value, start))}


def _tensors(parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        found |= {kind: value.detach() for kind, value in state.items() if isinstance(value, Tensor)}
    return found


def _kinds(parameter: nn.Parameter) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)


def _check_fit(state: State, directory: Path, name: str, optimizer: bool) -> None:
    """Compare what all ranks want with what is there; every rank comes to the same verdict."""
    saved = {k: s for k, s in shapes_in(directory).items() if k.startswith(OPTIMIZER) == optimizer}
    mine = {
        part.key: (tuple(part.global_shape), part.allow_shape_mismatch) for e in state.values() for part in parts_of(e)
    }
    wanted = {key: place for found in all_gather_objects(mine) for key, place in found.items()}
    for key in sorted(set(wanted) - set(saved)):
        raise CheckpointError(
            f"the training state {name!r} has no {key!r}: it was saved with other adapters, other trainable "
            f"parameters or another dtype; {AGAIN}"
        )
    extra = sorted(set(saved) - set(wanted))
    if extra:
        raise CheckpointError(
            f"the training state {name!r} holds {extra[0]!r} ({len(extra)} such), which the model does not train: "
            f"{AGAIN}"
        )
    for key, (shape, padded) in sorted(wanted.items()):
        # A padded vocabulary has another length in another layout.
        if saved[key] != shape and not (padded and saved[key][1:] == shape[1:]):
            raise CheckpointError(
                f"{key!r} has shape {saved[key]} in the training state {name!r} and {shape} in the model; {AGAIN}"
            )
