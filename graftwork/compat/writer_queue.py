"""How megatron-core's checkpoint writer works here: in its own process, and its results in a plain queue."""

import importlib
import logging
import queue
from collections.abc import Callable, Sequence

Results = dict[int, object]
"""What each bucket's items have become, by the number of the bucket."""


def install() -> None:
    """Set the queue that a save would otherwise make, and let no process be forked for the writing.

    A manager's queue imports the user's script again and costs seconds. A forked writer, as earlier versions have it,
    outlives a killed run and goes on writing; and when it is killed itself, the run waits for it for ever.
    """
    module = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if getattr(module, "_results_queue", None) is None:
        setattr(module, "_results_queue", queue.Queue())  # noqa: B010  (the module's own private name)
    writer: type = module.FileSystemWriterAsync
    if hasattr(writer, "write_preloaded_data_multiproc"):
        setattr(writer, "write_preloaded_data_multiproc", staticmethod(write_here))  # noqa: B010  (unknown to mypy)


def write_here(
    transforms: list[object], use_msc: bool, rank: int, buckets: Sequence[object], results: "queue.Queue[object]"
) -> None:
    """Write ``buckets`` one after the other; put what became of them, or the first one's error, into ``results``."""
    module = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    write: Callable[..., None] = module.FileSystemWriterAsync.write_preloaded_data
    done: Results = {}
    for number, bucket in enumerate(buckets):
        own: queue.Queue[tuple[int, object]] = queue.Queue()
        open_one: queue.Queue[int] = queue.Queue()
        open_one.put(number)
        write(transforms, number, bucket, own, open_one, True, **({"use_msc": True} if use_msc else {}))
        _, found = own.get_nowait()
        if isinstance(found, Exception):
            logging.getLogger(module.__name__).error(f"Local process {number} encountered an error: {found}")
            results.put(found)
            return
        done[number] = found
    results.put(done)
