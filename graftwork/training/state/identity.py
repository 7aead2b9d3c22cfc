"""Whose training state it is: base, adapters, data and settings of the run, and what of them may differ on resuming."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Optional, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from pydantic import BaseModel
from torch import Tensor

from graftwork.errors import CheckpointError, ConfigError, DataError, quoted, suggest
from graftwork.layout import Layout
from graftwork.optim import AdamW
from graftwork.parallel.collective import agreed, all_gather_objects, broadcast_object, world_rank, world_size
from graftwork.peft.artifact.directory import Base
from graftwork.peft.artifact.tensors import bring_together
from graftwork.peft.stack import Stack
from graftwork.training.run import RunFacts
from graftwork.training.trainee import data_of, trainee

SHOWN = 6
"""So many differences are told."""
_HASH = re.compile(r"[0-9a-f]{32,}")


@runtime_checkable
class KnowsBase(Protocol):
    """A model that knows which weights it stands on."""

    def base_identity(self) -> Base:
        """Family, shape and fingerprint of the base."""
        ...


@runtime_checkable
class HasStack(Protocol):
    """A model whose adapters' values can be read."""

    @property
    def stack(self) -> Stack:
        """The attached adapters."""
        ...


@runtime_checkable
class KnowsRows(Protocol):
    """Data that know what decides their training rows."""

    def decides(self) -> Mapping[str, object]:
        """What decides the training rows and their order, by option."""
        ...

    def around(self) -> Mapping[str, object]:
        """What may differ without another training, by option."""
        ...

    def accept_other_rows(self) -> None:
        """Go on at a position that was saved on other rows."""
        ...


class Identity(BaseModel):
    """A run by the paths of its recipe: fields that decide what it computes, those around them, the recipe's text."""

    decides: dict[str, object]
    around: dict[str, object]
    recipe: Optional[str] = None


class Verdict(BaseModel):
    """How a run differs from the one that saved a state: what was allowed, and what is worth a line."""

    allowed: list[str] = []
    noted: list[str] = []


def identity_of(model: LightningModule, trainer: Trainer, layout: Layout, facts: RunFacts) -> Identity:
    """Describe the run; the same on every rank. Raises DataError when the ranks read other training rows."""
    data = data_of(trainer)
    rows = agreed(lambda: _plain(data.decides()) if isinstance(data, KnowsRows) else {})
    if len({json.dumps(found, sort_keys=True) for found in all_gather_objects(rows)}) > 1:
        raise DataError("the ranks read different training data: put the same files on every machine.")
    # One rank reads the base for all: hashing it takes seconds a gigabyte.
    known = agreed(lambda: _base(model) if world_rank() == 0 else {})
    around = data.around() if isinstance(data, KnowsRows) and world_rank() == 0 else {}
    decides = {
        **broadcast_object(known),
        **_adapters(model),
        **_optimizer(model),
        **{f"trainer.{name}": getattr(trainer, name) for name in ("gradient_clip_val", "gradient_clip_algorithm")},
        "trainer.overfit_batches": getattr(trainer, "overfit_batches", 0),
        "data": type(data).__name__,
        **{f"data.{name}": value for name, value in rows.items()},
        "seed": facts.seed,
    }
    outside = {**_surroundings(model, trainer, layout), **{f"data.{name}": v for name, v in around.items()}}
    found = Identity(decides=_plain(decides), around=_plain(outside), recipe=facts.recipe_text)
    return broadcast_object(found)


def compare(saved: Identity | None, now: Identity, allow: Collection[str], state: str) -> Verdict:
    """Return how ``now`` differs from the run that saved ``state``; raises CheckpointError where it must not.

    ``allow`` names fields of ``decides`` that may differ; ConfigError for a name that neither run has.
    """
    if saved is None:
        return Verdict(noted=["it was saved by a version that did not keep what run it belongs to"])
    _check_names(allow, {**saved.decides, **now.decides})
    differ = [field for field in _ordered(saved.decides, now.decides) if _differs(field, saved.decides, now.decides)]
    refused = [field for field in differ if field not in allow]
    if refused:
        raise CheckpointError(_refusal(state, refused, saved.decides, now.decides))
    told = [_line(field, saved.decides, now.decides) for field in differ]
    told += [_line(f, saved.around, now.around) for f in _ordered(saved.around, now.around) if _other(f, saved, now)]
    told += _other_lines(saved, now)
    return Verdict(allowed=differ, noted=told)


def _base(model: LightningModule) -> dict[str, object]:
    found: dict[str, object] = {"model": type(model).__name__}
    chunk = next(iter(getattr(model, "chunks", [])), None)
    dtype = getattr(getattr(chunk, "config", None), "params_dtype", None)
    found |= {"model.dtype": str(dtype).removeprefix("torch.")} if dtype is not None else {}
    if isinstance(model, KnowsBase):
        base = model.base_identity()
        found |= {"model.checkpoint": base.fingerprint, "model.shape.family": base.family}
        found |= {f"model.shape.{name}": value for name, value in base.shape.items()}
    return found


def _adapters(model: LightningModule) -> dict[str, object]:
    found: dict[str, object] = {}
    for place, transform in enumerate(trainee(model).adapters.values()):
        found[f"peft[{place}]"] = type(transform).__name__
        found |= {f"peft[{place}].{name}": value for name, value in transform.hyperparameters().items()}
    places = {name: place for place, name in enumerate(trainee(model).adapters)}
    values = _frozen_values(model.stack) if isinstance(model, HasStack) else {}
    return found | {f"peft[{places[name]}].frozen values": value for name, value in values.items()}


def _frozen_values(stack: Stack) -> dict[str, str]:
    """Return, by adapter, the hash of what does not train, which no state holds; known to the first rank.

    Collective. Full tensors are hashed: the same in every parallel layout.
    """
    own = [t.key for name in stack.transforms for t in stack.tensors(name) if not t.parameter.requires_grad]
    frozen = {key for keys in all_gather_objects(own) for key in keys}
    names = [name for name in stack.transforms if any(key.partition(".")[0] == name for key in frozen)]
    full = bring_together(stack, names) or {}
    held = {name: {k: v for k, v in full.items() if k in frozen and k.partition(".")[0] == name} for name in names}
    return {name: _hash(tensors) for name, tensors in held.items()}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _optimizer(model: LightningModule) -> dict[str, object]:
    optim: object = getattr(model, "optim", None)
    options = optim.options() if isinstance(optim, AdamW) else {}
    return {"optim": type(optim).__name__, **{f"optim.{name}": value for name, value in options.items()}}


def _surroundings(model: LightningModule, trainer: Trainer, layout: Layout) -> dict[str, object]:
    steps = ("max_steps", "max_epochs", "val_check_interval", "limit_val_batches")
    return {
        "model.checkpoint (path)": getattr(model, "checkpoint", None),
        "model.recompute": getattr(model, "recompute", None),
        **{f"trainer.{name}": getattr(trainer, name) for name in steps},
        "trainer.devices (in all)": world_size(),
        **{f"trainer.strategy.{name}": value for name, value in asdict(layout).items()},
        "trainer.strategy.distributed_optimizer": getattr(trainer.strategy, "distributed_optimizer", None),
    }


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    """Return what JSON gives back: tuples are lists there."""
    found: dict[str, object] = json.loads(json.dumps(dict(values), default=repr))
    return found


def _root(field: str) -> str:
    return field.partition(".")[0]


def _ordered(*sides: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(field for side in sides for field in side))


def _differs(field: str, old: Mapping[str, object], new: Mapping[str, object]) -> bool:
    """Tell whether ``field`` is another; an option that only one version of the library knows is not."""
    if field in old and field in new:
        return old[field] != new[field]
    return field == _root(field)


def _other(field: str, saved: Identity, now: Identity) -> bool:
    return field in saved.around and field in now.around and saved.around[field] != now.around[field]


def _other_lines(saved: Identity, now: Identity) -> list[str]:
    """Return the lines of the recipes' texts that differ and that no known field tells."""
    known = {*saved.decides, *saved.around, *now.decides, *now.around}
    known |= {field.partition(" ")[0] for field in known} | {"data.validation", "trainer.devices", "resume"}
    old, new = (dict(_paths(side.recipe)) for side in (saved, now))
    if not old or not new:
        return []
    differ = [f for f in _ordered(old, new) if old.get(f) != new.get(f) and f not in known and f != "allow_changes"]
    return [_line(field, old, new) for field in differ]


def _paths(recipe: str | None) -> Iterable[tuple[str, str]]:
    lines = (line.partition(" = ") for line in (recipe or "").splitlines())
    return ((path, value) for path, sign, value in lines if sign)


def _check_names(allow: Collection[str], fields: Collection[str]) -> None:
    for name in allow:
        if name not in fields:
            raise ConfigError(f"allow_changes names {quoted(name)}, which is no such field; {suggest(name, fields)}")


def _refusal(state: str, refused: Sequence[str], old: Mapping[str, object], new: Mapping[str, object]) -> str:
    more = [f"... ({len(refused)} in all)"] if len(refused) > SHOWN else []
    lines = [*(_line(field, old, new) for field in refused[:SHOWN]), *more]
    names = ", ".join(map(repr, refused[:SHOWN])) + (", ..." if more else "")
    return (
        f"the training state {state!r} belongs to another run:\n  "
        + "\n  ".join(lines)
        + f"\nstart anew with resume=False, or let it go on differently with allow_changes=[{names}]."
    )


def _line(field: str, old: Mapping[str, object], new: Mapping[str, object]) -> str:
    before, after = (_shown(side[field]) if field in side else "absent" for side in (old, new))
    return f"{field}: {before} -> {after}"


def _shown(value: object) -> str:
    if isinstance(value, str) and _HASH.fullmatch(value):
        return f"content {value[:12]}"
    return quoted(value, 60)
