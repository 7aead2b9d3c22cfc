"""Queue: buckets on their way while the backward pass still runs, in one order on every rank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from graftwork.training.optimizer.bucket import Bucket


class Queue:
    """Sends ``buckets`` in their order, each as soon as the last microbatch has given it all its gradients.

    The order is the same on every rank: whether a gradient arrives depends on a rank's rows (an expert may be idle),
    and a bucket that stays incomplete holds up those behind it until the backward pass is over. A parameter that has
    several gradients in one backward pass, in layers that are computed again, is not complete with the first: the
    first step, in which nothing is sent early, shows which, and their buckets wait for the end.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self._of: dict[Tensor, Bucket] = {p: bucket for bucket in buckets for p in bucket.parameters}
        self._held: set[Bucket] = set()
        self._early = self._last = False
        self.zero()

    def zero(self) -> None:
        """Wait for the gradients of another step."""
        self._missing = {bucket: set[Tensor](bucket.parameters) for bucket in self._buckets}
        self._next = 0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Surround all microbatches but the last, as megatron-core's schedules do with every stage and chunk."""
        self._last = False
        yield
        self._last = True

    def arrived(self, parameter: Tensor) -> None:
        """Take note of a gradient."""
        bucket = self._of.get(parameter)
        if not self._last or bucket is None:
            return
        if parameter not in self._missing[bucket]:
            assert not bucket.sent, "a gradient has come after its bucket was sent"
            self._held.add(bucket)
        self._missing[bucket].discard(parameter)
        while self._early and self._next < len(self._buckets) and self._complete(self._buckets[self._next]):
            self._send()

    def finish(self) -> None:
        """Send what has not been sent: the backward pass is over."""
        self._last = False
        while self._next < len(self._buckets):
            self._send()
        self._early = True

    def _complete(self, bucket: Bucket) -> bool:
        return not self._missing[bucket] and bucket not in self._held

    def _send(self) -> None:
        self._buckets[self._next].send()
        self._next += 1
