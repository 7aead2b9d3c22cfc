"""Gradients of what trains on this rank: summed over the ranks that share a parameter, scaled, measured, clipped."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from graftwork import parallel
from graftwork.optim import MAIN_GRAD, gradient_of
from graftwork.parallel.collective import all_gather_objects
from graftwork.parallel.record import owner_of, record_of
from graftwork.training.optimizer.bucket import BUCKET_ELEMENTS, Bucket, Piece
from graftwork.training.optimizer.queue import Queue

T = TypeVar("T", bound=Tensor)


class Gradients:
    """The gradients of the trainable parameters in this rank's model ``chunks``; frozen ones get no buffer.

    They lie in buckets that data-parallel ranks sum while the backward pass of the last microbatch still runs; with
    ``sharded`` every rank keeps its shard of the sums. megatron-core's schedule tells which microbatch is the last.
    """

    def __init__(self, chunks: Sequence[nn.Module], sharded: bool = False) -> None:
        self.parameters = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        self.partial = [p for p in self.parameters if record_of(p).partial and parallel.tp_size() > 1]
        self.tied = _tied_embedding(chunks)
        self.has_experts = getattr(chunks[0].config, "num_moe_experts", None) is not None
        mine = sorted({owner_of(p) for p in self.parameters})
        self.owners = sorted({owner for found in all_gather_objects(mine) for owner in found})
        self.norms: dict[str, Tensor] = {}
        self._device = next(chunks[0].parameters()).device
        self._late = {*self.partial, *([self.tied] if self.tied is not None else [])}
        self.dense = self._buckets(expert=False, sharded=sharded)
        self.experts = self._buckets(expert=True, sharded=sharded)
        self._of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        place = {p: index for index, p in enumerate(self.parameters)}
        early = [bucket for bucket in self.buckets if not self._late.intersection(bucket.parameters)]
        self._queue = Queue(sorted(early, key=lambda bucket: -min(place[p] for p in bucket.parameters)))
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.parameters]
        self._configs = [chunk.config for chunk in chunks]
        self._sent = False
        self._listen(self._queue.no_sync, self._send)

    @property
    def buckets(self) -> list[Bucket]:
        """All buckets; the experts' stand last."""
        return [*self.dense, *self.experts]

    def pieces(self) -> dict[nn.Parameter, list[Piece]]:
        """Return this rank's pieces of every parameter that is shared out over ranks."""
        sharded = [bucket for bucket in self.buckets if bucket.sharded]
        found: dict[nn.Parameter, list[Piece]] = {p: [] for bucket in sharded for p in bucket.parameters}
        for piece in (piece for bucket in sharded for piece in bucket.own):
            found[piece.whole].append(piece)
        return found

    def zero(self) -> None:
        """Forget the gradients of the last step."""
        self._sent = False
        self._queue.zero()
        for bucket in self.buckets:
            bucket.zero()

    def finish(self, tokens: Tensor) -> None:
        """Turn gradients of this rank's loss *sum* into those of the global batch's mean over ``tokens``."""
        self._send()
        for bucket in self.buckets:
            bucket.wait()
        self._scale(1.0 / tokens.clamp(min=1).item())
        self.norms = dict(zip(self.owners, self._measured().sqrt()))

    @property
    def norm(self) -> Tensor:
        """L2 norm of the whole model's gradient, of which ``norms`` holds each adapter's part."""
        return torch.stack([*self.norms.values()]).square().sum().sqrt()

    def clip(self, limit: float) -> None:
        """Scale the gradients so that their global norm is at most ``limit``."""
        self._scale((limit / (self.norm + 1e-6)).clamp(max=1.0).to(self._device))

    def clip_values(self, limit: float) -> None:
        """Clamp every element of the gradients to [-limit, limit]."""
        for gradient in self._tensors():
            gradient.clamp_(-limit, limit)

    def of(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return what this rank holds of a parameter's gradient: all of it, or its flat pieces."""
        bucket = self._of[parameter]
        return [sums for piece, sums in zip(bucket.own, bucket.sums()) if piece.whole is parameter]

    def gather(self) -> None:
        """Bring every parameter together from the shards after a step."""
        for bucket in self.buckets:
            bucket.gather()

    def release(self) -> None:
        """Remove the hooks and fp32 accumulators from the parameters."""
        self._listen(None, None)
        for hook in self._hooks:
            hook.remove()
        for bucket in self.buckets:
            bucket.release()

    def _buckets(self, expert: bool, sharded: bool) -> list[Bucket]:
        """Share parameters out in the order of the backward pass; those that wait for other sums have their own."""
        group = parallel.expert_dp_group() if expert else parallel.dp_group(with_context_parallel=True)
        mine = [p for p in reversed(self.parameters) if record_of(p).expert == expert]
        kinds = [[p for p in mine if (p in self._late) == late] for late in (False, True)]
        return [Bucket(part, group, sharded) for kind in kinds for part in _parts(kind)]

    def _listen(self, no_sync: object, finalize: object) -> None:
        """Let megatron-core's schedule tell that the last microbatch begins, and that it is over."""
        for config in self._configs:
            setattr(config, "no_sync_func", no_sync)  # noqa: B010
            setattr(config, "finalize_model_grads_func", finalize)  # noqa: B010

    def _arrived(self, parameter: Tensor) -> None:
        main: Tensor | None = getattr(parameter, MAIN_GRAD, None)
        if main is not None:
            assert parameter.grad is not None
            main.add_(parameter.grad)
            parameter.grad = None
        self._queue.arrived(parameter)

    def _send(self, *_: object, **__: object) -> None:
        """Begin all sums that have not begun: the backward pass is over."""
        if self._sent:
            return
        self._sent = True
        self._queue.finish()
        late = [bucket for bucket in self.buckets if not bucket.sent]
        for bucket in late:
            bucket.fill()
        all_reduce(_gradients(self.partial), parallel.tp_group())
        if self.tied is not None:
            all_reduce(_gradients([self.tied]), parallel.embedding_group())
        for bucket in late:
            bucket.send()

    def _scale(self, factor: float | Tensor) -> None:
        every = self._tensors()
        if every:
            torch._foreach_mul_(every, factor)

    def _tensors(self) -> list[Tensor]:
        return [tensor for bucket in self.buckets for tensor in bucket.tensors()]

    def _measured(self) -> Tensor:
        """Squared norms over the whole model, by owner: copies on other tensor ranks and tied embeddings count once."""
        squares = self._squares(self.dense, _counts)
        dist.all_reduce(squares, group=parallel.model_parallel_group())
        if self.has_experts:
            expert = self._squares(self.experts, lambda _: True)
            dist.all_reduce(expert, group=parallel.model_parallel_group(expert=True))
            squares = squares + expert
        return squares

    def _squares(self, buckets: Sequence[Bucket], counts: Callable[[nn.Parameter], bool]) -> Tensor:
        """Add up the squares piece by piece: with the norms of all shards the sum is the same bits, sharded or not."""
        squares = torch.zeros(len(self.owners), device=self._device)
        if not buckets:
            return squares
        norms = torch.cat([_norms(bucket, counts) for bucket in buckets])
        if buckets[0].sharded:
            dist.all_reduce(norms, group=buckets[0].group)
        owners = [owner_of(piece.whole) for bucket in buckets for piece in bucket.pieces if counts(piece.whole)]
        places = torch.tensor([self.owners.index(owner) for owner in owners], device=self._device, dtype=torch.int64)
        return squares.index_add(0, places, norms.square())


def all_reduce(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Sum ``tensors`` in place over ``group``, in flat messages of one dtype; nothing is sent for nothing to sum."""
    if group.size() == 1:
        return
    for part in _parts(tensors):
        flat = torch.cat([t.flatten() for t in part])
        dist.all_reduce(flat, group=group)
        for tensor, summed in zip(part, flat.split([t.numel() for t in part])):
            tensor.copy_(summed.view_as(tensor))


def _parts(tensors: Sequence[T]) -> Iterator[list[T]]:
    """Cut ``tensors`` into runs of one dtype and at most so many elements, or of one tensor."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        part: list[T] = []
        for tensor in (t for t in tensors if t.dtype == dtype):
            if part and sum(t.numel() for t in part) + tensor.numel() > BUCKET_ELEMENTS:
                yield part
                part = []
            part.append(tensor)
        yield part


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [g for g in map(gradient_of, parameters) if g is not None]


def _norms(bucket: Bucket, counts: Callable[[nn.Parameter], bool]) -> Tensor:
    """Return the norms of all pieces that count on this rank; 0 for those of another rank's shard."""
    counted = [piece for piece in bucket.pieces if counts(piece.whole)]
    mine = [sums for piece, sums in zip(bucket.own, bucket.sums()) if counts(piece.whole)]
    norms = torch.zeros(len(counted), device=bucket.parameters[0].device)
    first = sum(piece.rank < bucket.group.rank() for piece in counted) if bucket.sharded else 0
    if mine:
        norms[first : first + len(mine)] = torch.stack(torch._foreach_norm(mine, 2)).float()
    return norms


def _counts(parameter: nn.Parameter) -> bool:
    """Return whether this rank's copy enters the norm."""
    record = record_of(parameter)
    return (record.cut or parallel.tp_rank() == 0) and not record.copy


def _tied_embedding(chunks: Sequence[nn.Module]) -> nn.Parameter | None:
    """Return the trainable embedding that the first and the last pipeline stage both hold, if this rank holds it."""
    if parallel.pp_size() == 1 or not (parallel.is_first_stage() or parallel.is_last_stage()):
        return None
    chunk = chunks[0] if parallel.is_first_stage() else chunks[-1]
    shared: Callable[[], nn.Parameter] | None = getattr(chunk, "shared_embedding_or_output_weight", None)
    if shared is None or not getattr(chunk, "share_embeddings_and_output_weights", False):
        return None
    weight = shared()
    return weight if weight.requires_grad else None
