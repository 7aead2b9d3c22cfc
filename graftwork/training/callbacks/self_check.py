"""Self checks, on by default: what must never pass silently stops the run with one sentence."""

import math
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from graftwork import parallel
from graftwork.batch import Batch
from graftwork.errors import TrainingError
from graftwork.parallel.collective import agree, all_gather_objects
from graftwork.parallel.record import BASE, owner_of, record_of
from graftwork.peft.adapter import Adapter
from graftwork.peft.stack import Stack
from graftwork.training.callbacks.ranks import largest
from graftwork.training.checksums import changed, checksums
from graftwork.training.strategy import MegatronStrategy
from graftwork.training.trainee import data_of, trainee

Named = Iterator[tuple[str, nn.Parameter]]


@runtime_checkable
class KnowsWhere(Protocol):
    """Data that can name the places their rows come from."""

    def where(self, rows: list[int], /) -> list[str]:
        """Return file and line of each dataset row."""
        ...


class SelfCheck(Callback):
    """Stops before the weights are touched by a loss or gradient that is not finite, naming the rows.

    First step: every trainable adapter has a non-zero gradient, so has every tensor that the base lends to one, and no
    frozen parameter has any. End: every adapter has moved, the frozen base has not, replicas agree. Costs two passes
    over the parameters per run, none per step.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._base: dict[str, tuple[int, int]] = {}
        self._trained: dict[str, tuple[int, int]] = {}
        self._first_step: int | None = None
        self._sent: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember base and adapters as training finds them."""
        self._first_step = trainer.global_step
        self._base = checksums(frozen(pl_module))
        self._trained = checksums(trainable(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keep the batch at hand, whose rows a loss that is not finite names; note which adapters have rows in it."""
        self._batch = batch
        names = trainee(pl_module).adapters
        self._sent |= {n for n in names if batch.routes is None or bool(batch.routes.acts(n).any())}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check loss and gradients while the weights are still good."""
        step = trainer.global_step + 1
        loss = float(trainer.callback_metrics.get("train_loss", 0.0))
        if not math.isfinite(loss):
            cause = _not_finite(pl_module) or self._rows(trainer)
            raise TrainingError(f"step {step}: the loss is {loss}; {cause}. Nothing was updated.")
        norm = float(trainer.callback_metrics.get("grad_norm", 0.0))
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {step}: the gradient norm is {norm} while the loss is {loss:.4f}. Nothing was updated."
            )
        if trainer.global_step == self._first_step:
            self._check_first_gradients(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what moved."""
        if trainer.global_step == self._first_step:
            return
        moved = changed(self._base, checksums(frozen(pl_module)))
        problem = f"the frozen base has changed: {_some(moved)}." if moved else self._unmoved(pl_module)
        agree(TrainingError(problem) if problem else None)
        problem = _replicas_differ(pl_module)
        agree(TrainingError(problem) if problem else None)

    def _check_first_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = [*sorted(trainee(pl_module).adapters), BASE]
        holds, alive = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for _, parameter in trainable(pl_module):
            owner = owner_of(parameter)
            holds[owner] = 1.0
            if _alive(trainer, parameter):
                alive[owner] = 1.0
        held, living = largest([holds[n] for n in names]), largest([alive[n] for n in names])
        sent = largest([float(n == BASE or n in self._sent) for n in names])
        dead = [n for n, h, a, rows in zip(names, held, living, sent) if rows and h and not a]
        if dead:
            raise TrainingError(f"no gradient reaches {_some(dead)}: it would stay at its initial values.")
        self._check_lent(trainer, pl_module)
        stray = [n for n, p in frozen(pl_module) if p.grad is not None]
        agree(TrainingError(f"frozen parameters have gradients: {_some(stray)}.") if stray else None)

    def _check_lent(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where a tensor of the base that an adapter trains has no gradient; an idle expert rightly has none."""
        stack: Stack | None = getattr(pl_module, "stack", None) if trainee(pl_module).adapters else None
        lent = [t for tensors in stack.lent.values() for t in tensors] if stack is not None else []
        held = [t for t in lent if t.parameter.requires_grad and not record_of(t.parameter).expert]
        alive = [t.tensor.name for t in held if _alive(trainer, t.parameter)]
        dead = sorted({t.tensor.name for t in held} - _everywhere(alive))
        agree(TrainingError(f"no gradient reaches {_some(dead)}: it would keep the base's values.") if dead else None)

    def _unmoved(self, pl_module: LightningModule) -> str | None:
        owners = {name: owner_of(parameter) for name, parameter in trainable(pl_module)}
        moved = changed(self._trained, checksums(trainable(pl_module)))
        still = set(owners.values()) - {owners[name] for name in moved if name in owners}
        adapters = trainee(pl_module).adapters
        stack: Stack | None = getattr(pl_module, "stack", None) if adapters else None
        if stack is not None:
            # An expert that no token chose rightly stays where it was.
            still |= {o for o in set(owners.values()) & set(adapters) if _any_unmoved(stack.adapters(o))}
        if not still:
            return None
        why = "is the learning rate 0?" if still & (self._sent | {BASE}) else "no row was sent to it"
        return f"training has not moved {_some(sorted(still))}; {why}"

    def _rows(self, trainer: Trainer) -> str:
        """Name the rows of the microbatches that are not finite, on whichever rank they were."""
        rows = sorted({r for found in all_gather_objects(self._bad_rows(trainer)) for r in found})
        if not rows:
            return "its rows are unknown"
        data = data_of(trainer)
        names = data.where(rows) if isinstance(data, KnowsWhere) else [str(r) for r in rows]
        return f"look at the rows {_some(names)}"

    def _bad_rows(self, trainer: Trainer) -> list[int]:
        batch = self._batch
        if batch is None or batch.rows is None:
            return []
        parts = list(batch.rows.split(batch.micro_batch_size or len(batch.rows)))
        last = trainer.strategy.last_step if isinstance(trainer.strategy, MegatronStrategy) else None
        if last is not None:
            sums = last.microbatches
            parts = [part for part, total in zip(parts, sums) if not bool(torch.isfinite(total))] if sums else []
        return [int(r) for part in parts for r in part.flatten().tolist() if r >= 0]


def _alive(trainer: Trainer, parameter: nn.Parameter) -> bool:
    """Tell whether what this rank holds of a gradient is anywhere other than zero."""
    if isinstance(trainer.strategy, MegatronStrategy):
        return any(bool(part.any()) for part in trainer.strategy.update.gradient_of(parameter))
    return parameter.grad is not None and bool(parameter.grad.any())


def _not_finite(module: nn.Module) -> str | None:
    """Name weights of the base that are not finite on any rank: no row is to blame for what they give."""
    base = ((name, p) for name, p in module.named_parameters() if owner_of(p) == BASE and p.is_floating_point())
    mine = [name for name, p in base if not bool(torch.isfinite(p).all())]
    names = sorted({name for found in all_gather_objects(mine) for name in found})
    return f"weights of the base are not finite: {_some(names)}; no row is to blame" if names else None


def trainable(module: nn.Module) -> Named:
    """Yield the parameters that train."""
    return ((n, p) for n, p in module.named_parameters() if p.requires_grad)


def frozen(module: nn.Module) -> Named:
    """Yield the parameters that do not train."""
    return ((n, p) for n, p in module.named_parameters() if not p.requires_grad)


def _replicas_differ(module: nn.Module) -> str | None:
    """Compare trained parameters that several ranks hold: over data-parallel ranks, and replicated ones over tensor."""
    if not parallel.is_initialized():
        return None
    mine = {n: p for n, p in trainable(module) if not record_of(p).expert}
    copies = {n: p for n, p in mine.items() if not record_of(p).cut}
    groups = {
        "data-parallel": (mine, parallel.dp_group(with_context_parallel=True)),
        "tensor-parallel": (copies, parallel.tp_group()),
    }
    for kind, (held, group) in groups.items():
        sums = all_gather_objects(checksums(held.items()), group)
        differ = sorted({n for other in sums for n in changed(sums[0], other)})
        if differ:
            return f"{kind} ranks disagree on {_some(differ)} after training."
    return None


def _everywhere(names: list[str]) -> set[str]:
    """Return the union of ``names`` over all ranks: each sees its part of a tensor."""
    return {name for found in all_gather_objects(names) for name in found}


def _any_unmoved(adapters: Iterable[Adapter]) -> bool:
    return any(not a.moved() for a in adapters if not any(record_of(p).expert for p in a.parameters()))


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(map(str, names[:limit])) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
