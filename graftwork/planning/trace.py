"""Trace: one microbatch run forward and backward without memory, with the bytes it would hold and the FLOPs it takes.

The model's own code runs on the meta device: whatever a method, a kind of model or recomputation keeps or drops is
kept or dropped here too.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from graftwork.batch import Batch
from graftwork.models.base import Model
from graftwork.models.recompute import start_gradients

Weigh = Callable[[Tensor], float]
"""The share of a tensor's bytes that a rank holds."""


@dataclass(frozen=True)
class Trace:
    """Bytes beside weights and gradients, and floating-point operations, of one microbatch.

    ``saved``: held between forward and backward; ``peak``: at most at one moment. ``attention`` is the part of
    ``forward`` that products of queries with keys and values take, over the pairs that may see each other.
    """

    saved: float
    peak: float
    forward: float
    backward: float
    attention: float


def trace(model: Model, batch: Batch, targets: int, weigh: Weigh = lambda _: 1.0) -> Trace:
    """Run ``model`` (on the meta device) on ``batch``, ``targets`` of whose positions have one."""
    tape = _Tape(_storages(model), weigh)
    with ExitStack() as stack:
        stack.enter_context(_forgotten_gradients(model))
        stack.enter_context(tape)
        stack.enter_context(stand_ins := _StandIns(targets, tape))
        stack.enter_context(_inside_attention(model, stand_ins))
        stack.enter_context(_from_the_embedding(model))
        output, loss_function = model.forward_step(iter([batch]), model.chunks[0])
        forward, attention = tape.flops + _alone(tape, partial(loss_function, output)), tape.attention
        loss, _, _ = loss_function(output)
        del output
        saved = tape.live
        loss.backward()
    return Trace(saved, tape.peak, forward, tape.flops - forward, attention)


class _Tape(TorchDispatchMode):
    """Follows the bytes of every storage from its first to its last use, and counts FLOPs by torch's own formulas."""

    def __init__(self, known: set[int], weigh: Weigh) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.attention = 0.0
        self._known, self._weigh = known, weigh
        self._held: dict[int, float] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        """Run the operator and note what it makes."""
        options = dict(kwargs or {})
        out = func(*args, **options)
        formula = flop_registry.get(getattr(func, "overloadpacket", func))
        if formula is not None:
            self.flops += formula(*args, **options, out_val=out)
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor) and value.is_meta:
                self._note(value)
        return out

    def add_attention(self, flops: float, forward: bool) -> None:
        """Count what the stand-in of attention does not compute."""
        self.flops += flops
        self.attention += flops if forward else 0.0

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or key in self._known:
            return
        self._held[key] = storage.nbytes() * self._weigh(tensor)
        self.live += self._held[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._held.pop(key, 0.0)


class _StandIns(TorchFunctionMode):
    """Answers what the meta device cannot: how many positions have a target, what attention kernels keep."""

    def __init__(self, targets: int, tape: _Tape) -> None:
        super().__init__()
        self._targets, self._tape = targets, tape

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        """Replace the call, or let it pass."""
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and _is_fused(options):
            causal = bool(options.get("is_causal"))
            return _FusedAttention.apply(*args[:3], options.get("attn_mask"), causal, self._tape)
        if func is Tensor.nonzero and args[0].is_meta:
            return torch.empty(self._targets, args[0].dim(), dtype=torch.int64, device="meta")
        return func(*args, **options)


def _is_fused(options: Mapping[str, Any]) -> bool:
    """Tell whether torch takes a kernel that never holds all scores: not with dropout, nor with a trained bias."""
    mask = options.get("attn_mask")
    return not options.get("dropout_p") and (mask is None or not mask.requires_grad)


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its arguments, the mask too, its output and one fp32 number for each query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor], causal: bool, tape: _Tape
    ) -> Tensor:
        """query [b, heads, sq, d], key and value [b, groups, sk, d] -> [b, heads, sq, d]."""
        out = torch.empty_like(query)
        kept = [one for one in (query, key, value, mask, out) if one is not None]
        ctx.save_for_backward(*kept, query.new_empty(query.shape[:-1], dtype=torch.float32))
        rows, heads, length, channels = query.shape
        pairs = length * (length + 1) / 2 if causal else length * key.shape[2]
        ctx.flops = 4.0 * rows * heads * channels * pairs
        ctx.tape = tape
        tape.add_attention(ctx.flops, forward=True)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Make the gradients of query, key and value."""
        query, key, value = ctx.saved_tensors[:3]
        ctx.tape.add_attention(2 * ctx.flops, forward=False)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None, None


def _alone(tape: _Tape, compute: Callable[[], object]) -> float:
    """Return the FLOPs of ``compute`` without gradients, which a loss makes on the way; they count as backward's."""
    before = tape.flops
    with torch.no_grad():
        compute()
    taken, tape.flops = tape.flops - before, before
    return taken


@contextmanager
def _inside_attention(model: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """Keep ``mode`` on in every core attention: torch turns modes off in a backward pass, which may recompute it."""

    def enter(*_: object) -> None:
        mode.__enter__()

    def leave(*_: object) -> None:
        mode.__exit__(None, None, None)

    cores = [module for name, module in model.named_modules() if name.endswith("core_attention")]
    hooks = [core.register_forward_pre_hook(enter) for core in cores]
    hooks += [core.register_forward_hook(leave, always_call=True) for core in cores]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _from_the_embedding(model: Model) -> Iterator[None]:
    """Let gradients reach every layer, so that one that stands for many does not depend on where it stands."""
    hook = model.chunks[0].embedding.register_forward_hook(start_gradients)  # type: ignore[union-attr]
    try:
        yield
    finally:
        hook.remove()


def _storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    for part in model.modules():
        tensors += [value for value in vars(part).values() if isinstance(value, Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


@contextmanager
def _forgotten_gradients(model: nn.Module) -> Iterator[None]:
    """Drop every gradient as soon as it is whole: what is accumulated is counted from the parameters."""

    def forget(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(forget) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
