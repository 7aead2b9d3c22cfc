"""Trained parameters and their optimizer state as named shards: written once each, read back in any layout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graftwork.compat import parallel
from graftwork.compat.sharding import Sharding
from graftwork.errors import CheckpointError
from graftwork.peft.match import global_name
from graftwork.training.gradients import is_expert

WEIGHT = "weight"
TIED_EMBEDDING = "embedding.word_embeddings.weight"
Index = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one trained parameter, under the name it has in a one-process model."""

    name: str
    parameter: nn.Parameter
    sharding: Sharding
    rank: int
    size: int
    written_here: bool

    def entry(self, file: str, kinds: list[str]) -> dict[str, Any]:
        """Return what the index remembers: how the tensor is cut, and which file holds this part."""
        cut = {"shape": list(self.sharding.shape), "dim": self.sharding.dim, "blocks": self.sharding.blocks}
        return {
            **cut,
            "padded": self.sharding.padded,
            "size": self.size,
            "kinds": kinds,
            "parts": {str(self.rank): file},
        }


def trained_shards(module: Any) -> list[Shard]:
    """List what trains on this rank of ``module`` (a LightningModule with ``module`` or ``chunks``)."""
    sharding_for = _base_shardings(module)
    return [
        _shard(global_name(chunk, path), path, parameter, chunk, sharding_for)
        for chunk in chunks_of(module)
        for path, parameter in chunk.named_parameters()
        if parameter.requires_grad
    ]


def chunks_of(module: Any) -> list[nn.Module]:
    """Return this rank's model chunks: one, or one per virtual pipeline stage."""
    inner = module.module
    return list(inner) if isinstance(inner, nn.ModuleList | list) else [inner]


def tensors_of(shard: Shard, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the parameter and the optimizer's tensors for it, by kind."""
    found = {WEIGHT: shard.parameter.detach()}
    for optimizer in optimizers:
        state = optimizer.state.get(shard.parameter, {})
        found |= {kind: value.detach() for kind, value in state.items() if isinstance(value, Tensor)}
    return {kind: value.cpu().contiguous() for kind, value in found.items()}


class ShardReader:
    """Reads this rank's parts of a saved state, whatever layout it was saved in."""

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory = directory
        self.index = index
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.clear()

    def kinds(self, shard: Shard) -> list[str]:
        """Return the kinds of tensors saved for ``shard``; CheckpointError when there are none or the shape differs."""
        entry = self.index.get(shard.name)
        if entry is None:
            raise CheckpointError(
                f"the training state {str(self.directory)!r} has no {shard.name!r}: it was saved with other adapters "
                "or other trainable parameters; resume with the same recipe, or start anew with resume=False."
            )
        if tuple(entry["shape"]) != shard.sharding.shape:
            raise CheckpointError(
                f"{shard.name!r} has shape {tuple(entry['shape'])} in the training state {str(self.directory)!r} and "
                f"{shard.sharding.shape} in the model; resume with the same recipe, or start anew with resume=False."
            )
        return list(entry["kinds"])

    def read(self, shard: Shard, kind: str) -> Tensor:
        """Return this rank's part of one saved tensor."""
        entry = self.index[shard.name]
        if kind == "step":  # a number, the same on every rank
            return self._tensor(next(iter(entry["parts"].values())), f"{shard.name}|{kind}")
        size = entry["size"]
        if size == shard.size or shard.sharding.dim is None:
            rank = str(shard.rank) if str(shard.rank) in entry["parts"] else "0"
            return self._tensor(entry["parts"][rank], f"{shard.name}|{kind}")
        saved = Sharding(tuple(entry["shape"]), entry["dim"], entry["blocks"], entry["padded"])
        parts = [self._tensor(entry["parts"][str(r)], f"{shard.name}|{kind}") for r in range(size)]
        return shard.sharding.take(saved.join(parts), shard.rank, shard.size)

    def _tensor(self, file: str, key: str) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.directory / file), framework="pt")
            return self._open[file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the training state {str(self.directory)!r} is damaged ({file}: {error}); "
                "delete that directory to resume from the one before."
            ) from error


def merge_index(parts: list[Index]) -> Index:
    """Merge the indices of all ranks into one."""
    whole: Index = {}
    for index in parts:
        for name, entry in index.items():
            whole.setdefault(name, {**entry, "parts": {}})["parts"].update(entry["parts"])
    return whole


def _shard(name: str, path: str, parameter: nn.Parameter, chunk: Any, sharding_for: Callable[..., Sharding]) -> Shard:
    expert = is_expert(path, parameter)
    copy = bool(getattr(parameter, "shared", False))  # the last stage's copy of a tied embedding
    name = TIED_EMBEDDING if copy else name
    own = getattr(parameter, "sharding", None)
    sharding = own if own is not None else sharding_for(name, parameter, chunk)
    cut = sharding.dim is not None and not expert
    rank, size = (parallel.tp_rank(), parallel.tp_size()) if cut else (0, 1)
    replicas = parallel.expert_dp_group() if expert else parallel.dp_group(with_context_parallel=True)
    first = replicas.rank() == 0 and (cut or expert or parallel.tp_rank() == 0)
    return Shard(name, parameter, sharding, rank, size, first and not copy)


def _base_shardings(module: Any) -> Callable[..., Sharding]:
    """Return the function from a base parameter to how it is cut: the weight mapping's where the model has a shape."""
    shape = getattr(module, "shape", None)
    if shape is None:
        return _megatron_sharding
    from graftwork.models.hf import mapping_for

    mapping = mapping_for(shape, parallel.tp_size())
    return lambda name, parameter, chunk: mapping.sharding(name)


def _megatron_sharding(name: str, parameter: nn.Parameter, chunk: Any) -> Sharding:
    shape = list(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False) or is_expert(name, parameter):
        return Sharding(tuple(shape))
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    shape[dim] *= parallel.tp_size()
    gated = "linear_fc1" in name and chunk.config.gated_linear_unit
    return Sharding(tuple(shape), dim, blocks=2 if gated else 1)
