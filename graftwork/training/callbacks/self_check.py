"""Self checks, on by default: what must never pass silently stops the run with one sentence."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from graftwork import parallel
from graftwork.errors import TrainingError
from graftwork.optim import adapter_of, gradient_of
from graftwork.parallel.collective import agree, all_gather_objects
from graftwork.training.checksums import changed, checksums
from graftwork.training.optimizer.gradients import is_expert

Named = Iterator[tuple[str, nn.Parameter]]


class SelfCheck(Callback):
    """Stops before the weights are touched by a loss or gradient that is not finite, naming the rows.

    First step: every trainable adapter has a non-zero gradient, no frozen parameter has any. End: every adapter has
    moved, the frozen base has not, replicas agree. Costs two passes over the parameters per run, none per step.
    """

    def __init__(self) -> None:
        self._batch: dict[str, Any] = {}
        self._base: dict[str, tuple[int, int]] = {}
        self._trained: dict[str, tuple[int, int]] = {}
        self._first_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Remember base and adapters as training finds them."""
        self._first_step = trainer.global_step
        self._base = checksums(frozen(pl_module))
        self._trained = checksums(trainable(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the batch at hand: a loss that is not finite must name its rows."""
        self._batch = batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Check loss and gradients while the weights are still good."""
        step = trainer.global_step + 1
        loss = float(trainer.callback_metrics.get("train_loss", 0.0))
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the loss is {loss}; {self._rows(trainer)}. Nothing was updated.")
        norm = float(trainer.callback_metrics.get("grad_norm", 0.0))
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {step}: the gradient norm is {norm} while the loss is {loss:.4f}. Nothing was updated."
            )
        if trainer.global_step == self._first_step:
            self._check_first_gradients(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Check what moved."""
        if trainer.global_step == self._first_step:
            return
        moved = changed(self._base, checksums(frozen(pl_module)))
        problem = f"the frozen base has changed: {_some(moved)}." if moved else self._unmoved(pl_module)
        agree(TrainingError(problem) if problem else None)
        problem = _replicas_differ(pl_module)
        agree(TrainingError(problem) if problem else None)

    def _check_first_gradients(self, pl_module: Any) -> None:
        names = [*sorted(pl_module.adapters), "base"]
        holds, alive = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for name, parameter in trainable(pl_module):
            owner, gradient = adapter_of(name) or "base", gradient_of(parameter)
            holds[owner] = 1.0
            if gradient is not None and bool(gradient.any()):
                alive[owner] = 1.0
        held, living = _over_ranks([holds[n] for n in names]), _over_ranks([alive[n] for n in names])
        dead = [n for n, h, a in zip(names, held, living) if h and not a]
        if dead:
            raise TrainingError(f"no gradient reaches {_some(dead)}: it would stay at its initial values.")
        stray = [n for n, p in frozen(pl_module) if p.grad is not None]
        agree(TrainingError(f"frozen parameters have gradients: {_some(stray)}.") if stray else None)

    def _unmoved(self, pl_module: Any) -> str | None:
        moved = set(changed(self._trained, checksums(trainable(pl_module))))
        owners = {adapter_of(n) or "base" for n in self._trained}
        still = owners - {adapter_of(n) or "base" for n in moved}
        adapters = pl_module.adapters
        stack: Any = getattr(pl_module, "stack", None) if adapters else None
        for owner in owners & set(adapters) if stack is not None else ():
            # An expert that no token chose rightly stays where it was.
            still |= {owner for a in stack.adapters(owner) if a.parallel and not a.moved()}
        return f"training has not moved {_some(sorted(still))}; is the learning rate 0?" if still else None

    def _rows(self, trainer: Trainer) -> str:
        """Name the rows of the microbatches that are not finite, on whichever rank they were."""
        rows = [r for found in all_gather_objects(self._bad_rows(trainer)) for r in found]
        if not rows:
            return "its rows are unknown"
        where = getattr(trainer.datamodule, "where", None)  # type: ignore[attr-defined]
        names = where(sorted(set(rows))) if where is not None else [str(r) for r in sorted(set(rows))]
        return f"look at the rows {_some(names)}"

    def _bad_rows(self, trainer: Trainer) -> list[int]:
        rows = self._batch.get("rows")
        if rows is None:
            return []
        last = getattr(trainer.strategy, "last_step", None)
        size = int(self._batch.get("micro_batch_size", len(rows)))
        parts: list[Tensor] = list(rows.split(size))
        if last is not None:
            sums = last.microbatches
            parts = [part for part, total in zip(parts, sums) if not bool(torch.isfinite(total))] if sums else []
        return [int(r) for part in parts for r in part.flatten().tolist() if r >= 0]


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
    mine = {n: p for n, p in trainable(module) if not is_expert(n, p)}
    copies = {n: p for n, p in mine.items() if not getattr(p, "tensor_model_parallel", False)}
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


def _over_ranks(values: list[float]) -> list[float]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    tensor = torch.tensor(values, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(map(str, names[:limit])) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
