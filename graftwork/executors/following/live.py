"""What a launch shows of its task while it runs: the lines of rank 0, as the same recipe prints in one process."""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from graftwork.executors.following.outcome import RANK_PREFIX, USER_ERROR

PREFIX = 10
"""So many characters of a name are shown."""


class LiveLog(io.TextIOBase):
    """A stdout that thins out the log of a task that NeMo Run prints; what else is printed passes.

    Left out are other ranks, torchrun's own lines where there are ranks, and errors that ``launch`` raises itself. All
    of them stand in the log. Set ``silent`` to leave out the rest of the log.
    """

    encoding = "utf-8"

    def __init__(self, stdout: TextIO, task: str, ranks: bool) -> None:
        self.stdout, self.ranks, self.silent = stdout, ranks, False
        # NeMo Run's prefix of a line: the end of the task's (of a container, its longer) name and a number, green on a
        # terminal
        end = task[-PREFIX:]
        before = rf"[\w-]{{0,{PREFIX - len(end)}}}"
        self._prefix = re.compile(rf"(\x1b\[32m)?{before}{re.escape(end)}/\d+(\x1b\[0m)? ")
        self.encoding = stdout.encoding

    def write(self, text: str) -> int:
        """Write what of ``text`` is to be seen; NeMo Run writes a line of the log at a time."""
        shown = "".join(map(self._shown, text.splitlines(keepends=True)))
        if shown:
            self.stdout.write(shown)
        return len(text)

    def flush(self) -> None:
        """Flush the real stdout."""
        self.stdout.flush()

    def isatty(self) -> bool:
        """Whether the real stdout is a terminal."""
        return self.stdout.isatty()

    def fileno(self) -> int:
        """Return the file descriptor of the real stdout."""
        return self.stdout.fileno()

    def _shown(self, line: str) -> str:
        prefix = self._prefix.match(line)
        if prefix is None:
            return line
        line = line[prefix.end() :]
        rank = RANK_PREFIX.match(line)
        if self.silent or (self.ranks and (rank is None or rank[1] != "0")):
            return ""
        line = line[rank.end() :] if rank else line
        return "" if USER_ERROR.match(line) else line


@contextmanager
def live_log(task: str, ranks: bool) -> Iterator[LiveLog]:
    """Let what is printed to stdout go through a LiveLog; ``ranks`` says that torchrun marks the lines of ``task``."""
    log = LiveLog(sys.stdout, task, ranks)
    with redirect_stdout(log):
        yield log
