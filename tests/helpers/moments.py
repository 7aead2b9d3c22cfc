"""Moments of a life: every call by which a process changes a directory, counted; at one of them something happens.

Python tells its audit hooks of each call before it is made: making, renaming and removing of files and directories, and
opening for writing. ``os.fsync`` is told of by a wrapper. What happens may be the end of the process or an OSError.
"""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import PRELOADED, _environment

CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
Act = Callable[[int, str], None]
"""Gets the moment's number, from 0, and the call: its name and the path."""

_watchers: list[Callable[[str, str], None]] = []
"""An audit hook stays for the life of the process: it asks here who is watching now."""


@contextmanager
def watched(root: Path, act: Act = lambda number, call: None) -> Iterator[list[str]]:
    """Yield the list of calls below ``root`` by this thread; ``act`` is called before each of them is made."""
    calls: list[str] = []
    thread = threading.current_thread()

    def note(event: str, path: str) -> None:
        if path.startswith(str(root)) and threading.current_thread() is thread:
            calls.append(f"{event} {path.removeprefix(str(root))}")
            act(len(calls) - 1, calls[-1])

    _watchers.append(note)
    if len(_watchers) == 1 and not getattr(sys, "_moments", False):
        sys._moments = True  # type: ignore[attr-defined]
        sys.addaudithook(_hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _told(os.fsync))
        try:
            yield calls
        finally:
            _watchers.remove(note)


def die_at(named: str | None, before: int = 0) -> Act:
    """Kill the process before a call that is ``named`` so is made, after ``before`` others of the name; None: never."""
    seen = 0

    def act(number: int, call: str) -> None:
        nonlocal seen
        if name_of(call) == named:
            seen += 1
            if seen > before:
                os.kill(os.getpid(), signal.SIGKILL)

    return act


def name_of(call: str) -> str:
    """Return a call without what differs from one life to the next: process numbers and random parts of names."""
    return re.sub(r"\d+-[0-9a-f]{8}|[0-9a-f]{16,}", "*", call)


def _hook(event: str, arguments: Sequence[Any]) -> None:
    if not _watchers:
        return
    if event in CHANGING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            _tell(event, os.fsdecode(path))


def _told(fsync: Callable[[int], None]) -> Callable[[int], None]:
    def told(handle: int) -> None:
        _tell("os.fsync", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    return told


def _tell(event: str, path: str) -> None:
    for watcher in list(_watchers):
        watcher(event, path)


def live(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` on every rank, as torchrun would: when one rank dies, the others are killed.

    Return what the ranks return, the traceback of those that raised, the exit code of those that died.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "graftwork.training", "tests.helpers.tiny_run", "datasets"])
    store = args[0] / f".store-{os.urandom(4).hex()}"
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    with _environment():
        ranks = [
            context.Process(target=_live, args=(rank, world_size, str(store), pipes[rank][1], fn, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
    for _, sender in pipes:
        sender.close()
    try:
        answers: dict[int, Any] = {}
        while len(answers) < world_size:
            waiting = {pipes[r][0]: r for r in range(world_size) if r not in answers}
            ready = connection.wait(list(waiting), timeout)
            assert ready, f"nothing was heard of the ranks for {timeout} s"
            for receiver in ready:
                rank = waiting[receiver]
                answers[rank] = _answer(receiver, ranks[rank])
            if any(isinstance(answer, int) and answer < 0 for answer in answers.values()):
                for process in ranks:
                    process.kill()
        return [answers[rank] for rank in range(world_size)]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _answer(receiver: Any, process: Any) -> Any:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return process.exitcode


def _live(rank: int, world_size: int, store: str, sender: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    if world_size > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    answer: Any = None
    try:
        answer = fn(rank, world_size, *args)
    finally:
        sender.send(answer if sys.exception() is None else traceback.format_exc())
        sender.close()
        os._exit(0)  # others may be gone already: nothing is waited for
