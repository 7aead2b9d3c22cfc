"""What a start leaves in memory is no garbage: nobody looks for any while it is made, or ever in it."""

import gc

WHILE_STARTING = 1_000_000
"""Objects that are made before the collector looks; it took an eighth of a start, and found nothing."""

_usual: list[tuple[int, int, int]] = []


def starting() -> None:
    """Let the collector rest while a process that is all ours imports its modules."""
    _usual.append(gc.get_threshold())
    gc.set_threshold(WHILE_STARTING)


def started() -> None:
    """Let it work as usual again, on what is made from now on; nothing where it did not rest."""
    if _usual:
        gc.freeze()
        gc.set_threshold(*_usual.pop())
