"""How a run ends when it is asked to stop: the exit codes, and the exception that carries one out of the process."""

import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE_EXIT_CODE = 75
"""Exit code of a run that saved its state and stopped on SIGTERM or SIGUSR1 (EX_TEMPFAIL): start it again to resume."""

INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C, whether there was something to save or not."""

TERMINATED_EXIT_CODE = 143
"""Exit code of a run that was asked to stop before there was anything to save."""

STOPPING = "stopping after this step to save the state; Ctrl-C again stops at once"
STOPPED_AT_ONCE = "stopped at once; the same command goes on from the last saved state"
NOTHING_SAVED = "stopped before there was anything to save; the same command begins where this one did"

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_STOPPED = re.compile(r"(stopped .*) \(exit code (\d+)\)$")


class Interrupted(SystemExit):
    """The run stopped because it was asked to; ``message`` says after what and how to go on."""

    def __init__(self, sentence: str, code: int = RESUMABLE_EXIT_CODE) -> None:
        super().__init__(code)
        self.message = f"{sentence} (exit code {code})"
        self._told = False

    def __str__(self) -> str:
        return self.message

    def tell(self) -> None:
        """Write the message to stderr, once."""
        if not self._told:
            self._told = True
            say(self.message)


def code_of(number: int, saved: bool) -> int:
    """Return the exit code of a run that signal ``number`` has stopped, its state ``saved`` or not."""
    if number == signal.SIGINT:
        return INTERRUPTED_EXIT_CODE
    return RESUMABLE_EXIT_CODE if saved else TERMINATED_EXIT_CODE


def stop_told(lines: Iterable[str]) -> Interrupted | None:
    """Return the last stop that a log tells of; None where it tells of none."""
    found = [match for match in map(_STOPPED.match, lines) if match]
    return Interrupted(found[-1][1], int(found[-1][2])) if found else None


@contextmanager
def stoppable() -> Iterator[None]:
    """Leave with ``Interrupted``, and say so, when this process is asked to stop.

    Outside the main thread nothing listens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _leave) for number in _STOP_SIGNALS}
    try:
        yield
    except Interrupted as stopped:
        stopped.tell()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def say(sentence: str) -> None:
    """Write a line to stderr at once: a signal handler cannot print, it may have come in the middle of a print."""
    os.write(2, f"{sentence}\n".encode())


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # the next one ends the process even where Python is not reached
    raise Interrupted(NOTHING_SAVED, code_of(number, saved=False))
