"""A function over many items, in processes of their own: results come in order, as from ``map``.

The processes are started afresh, not forked: a training process has threads and devices that a fork would break, and a
script without a main guard would be run again by a spawn.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Generic, TypeVar

from graftwork.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8
"""Most processes: one reader feeds them all."""
AHEAD = 2
"""Items a process that wait or are done before their turn."""


def processes() -> int:
    """Return how many processes the cores of this one allow."""
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def mapped(function: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """Yield ``function(item)`` of every item in order, from ``count`` processes (1: this one).

    Function, items and results are pickled; at most ``AHEAD * count`` items are on their way. An error of an item is
    raised at its turn. Raises DataError when a process ends by itself.
    """
    if count == 1:
        yield from map(function, items)
        return
    workers = [_Worker(function) for _ in range(count)]
    idle: SimpleQueue[_Worker[Item, Result]] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def call(item: Item) -> Result:
        worker = idle.get()
        try:
            return worker.call(item)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(count, "encode")
    try:
        yield from _in_order(pool, call, items, AHEAD * count)
    finally:
        for worker in workers:
            worker.stop()
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, call: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    problem: DataError | None = None
    rest = iter(items)
    while True:
        try:
            waiting.append(pool.submit(call, next(rest)))
        except StopIteration:
            break
        except DataError as error:  # of the reader; what was read before it has its turn first
            problem = error
            break
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
    if problem is not None:
        raise problem


class _Worker(Generic[Item, Result]):
    """One process that runs the function on what it is sent."""

    def __init__(self, function: Callable[[Item], Result]) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", __name__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.function = pickle.dumps(function)
        self.told = False

    def call(self, item: Item) -> Result:
        """Return the function's result on one item, or raise its error."""
        sent, received = self.process.stdin, self.process.stdout
        assert sent is not None and received is not None, "both are pipes"
        try:
            if not self.told:
                sent.write(self.function)
                self.told = True
            pickle.dump(item, sent)
            sent.flush()
            good, result = pickle.load(received)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise DataError(
                f"a process that encodes rows ended with code {self.process.wait()}; there may be too little memory."
            ) from None
        if not good:
            raise result
        answer: Result = result
        return answer

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was not sent yet has no reader
                if pipe is not None:
                    pipe.close()


def _serve(received: IO[bytes], sent: IO[bytes]) -> None:
    """Answer items until there are no more: (True, result), or (False, error) for an error of the data."""
    function = pickle.load(received)
    while True:
        try:
            item = pickle.load(received)
        except EOFError:  # whoever asked is done, or gone
            return
        try:
            answer = pickle.dumps((True, function(item)))
        except DataError as error:
            answer = pickle.dumps((False, error))
        sent.write(answer)
        sent.flush()


def main() -> None:
    """Serve on standard input and output; what libraries print goes to standard error."""
    with open(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
