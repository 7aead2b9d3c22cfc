"""Runs a function on several gloo ranks, each in its own process, and gives back what the ranks return."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
# The fork server imports these once and every rank is a cheap fork of it; none of them may start a thread.
PRELOADED = ["graftwork.core.gpt", "graftwork.parallel.state", "lightning.pytorch", "graftwork.models"]


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message carries its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Return ``[fn(rank, world_size, *args) for every rank]``, run at the same time on gloo.

    ``fn`` is a top-level function that finds ``torch.distributed`` initialised; arguments and results are pickled.
    The first rank that raises ends the run with its traceback; after ``timeout`` seconds the ranks are killed.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as directory, _environment():
        store = str(Path(directory) / "store")
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, store, timeout, pipes[rank][1], fn, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for _, sender in pipes:
            sender.close()
        patience = 0.0
        try:
            results = _collect([receiver for receiver, _ in pipes], timeout)
            patience = 10.0
            return results
        finally:
            _end(ranks, patience)


def _end(ranks: list[Any], patience: float) -> None:
    """Wait for ranks that leave by themselves; kill the others."""
    for process in ranks:
        process.join(timeout=patience)
        if process.exitcode is None:
            process.kill()
            process.join()


@contextmanager
def _environment() -> Iterator[None]:
    """Set the children's environment: threads per rank, and the repository on the path of the fork server."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join([str(ROOT), before.get("PYTHONPATH", "")]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _collect(receivers: list[Any], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    waiting = dict(zip(receivers, range(len(receivers)), strict=True))
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"rank(s) {sorted(waiting.values())} did not finish within {timeout} s and were killed.")
        for receiver in ready:
            rank = waiting.pop(receiver)
            results[rank] = _receive(receiver, rank)
    return [results[rank] for rank in range(len(receivers))]


def _receive(receiver: Any, rank: int) -> Any:
    try:
        good, payload = receiver.recv()
    except EOFError:
        raise RankFailed(f"rank {rank} died without a word.") from None
    if not good:
        raise RankFailed(f"rank {rank} raised:\n{payload}")
    return pickle.loads(payload)


def _rank(
    rank: int, world_size: int, store_path: str, timeout: float, sender: Any, fn: Callable[..., Any], args: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    answer = None
    try:
        store = dist.FileStore(store_path, world_size)
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        answer = (True, pickle.dumps(fn(rank, world_size, *args)))
    finally:
        sender.send(answer or (False, traceback.format_exc()))
        sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()
