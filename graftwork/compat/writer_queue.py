"""How megatron-core's checkpoint writer hands its results back: a plain queue in place of a multiprocessing manager."""

import importlib
import queue


def install() -> None:
    """Set the queue that a save would otherwise make: a manager imports the user's script again and costs seconds."""
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if getattr(writer, "_results_queue", None) is None:
        setattr(writer, "_results_queue", queue.Queue())  # noqa: B010  (the module's own private name)
