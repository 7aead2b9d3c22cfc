"""A function that processes of their own can import quickly: it doubles, complains or dies."""

import os
import signal

from graftwork.errors import DataError


def work(item: int) -> tuple[int, bool]:
    """Double the item, and tell whether that was done elsewhere; print, as libraries do."""
    print("a library says something")
    if item == 13:
        raise DataError("thirteen")
    if item == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * item, os.getpid() == int(os.environ["ASKING"])
