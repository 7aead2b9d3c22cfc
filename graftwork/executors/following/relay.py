"""Passes the signals that a launching process gets on to the tasks that it has started on this machine."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import nemo_run as run

from graftwork.endings import NOTHING_SAVED, STOPPED_AT_ONCE, STOPPING, Interrupted, code_of, say
from graftwork.executors.following.live import LiveLog
from graftwork.executors.process import life_line

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Relay:
    """Hands signals to the tasks of one experiment: on this machine as they come, elsewhere as a cancel.

    The second Ctrl-C kills the tasks of this machine. ``stopped_by`` is the first signal that came, None before that.
    """

    def __init__(self, log: LiveLog) -> None:
        self.stopped_by: int | None = None
        self._log = log
        self._experiment: run.Experiment | None = None
        self._killed = False
        self._lock = threading.RLock()

    def attach(self, experiment: run.Experiment) -> None:
        """Take over the tasks that have just started; a signal that came before reaches them now."""
        with self._lock:
            self._experiment = experiment
            self._pass_on()

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        """Pass signal ``number`` on, once: a second one would take from torchrun the patience to wait for its ranks."""
        with self._lock:
            if self.stopped_by is None:
                self.stopped_by, self._log.silent = number, True
                say(STOPPING)
            elif number == signal.SIGINT:
                self._killed = True
            else:
                return
            self._pass_on()

    def ending(self, told: BaseException | None) -> BaseException | None:
        """Return how the launch ends when its tasks ended with ``told``, None for a success."""
        if self.stopped_by is None or told is None or isinstance(told, Interrupted):
            return told
        sentence = STOPPED_AT_ONCE if self._killed else NOTHING_SAVED
        return Interrupted(sentence, code_of(self.stopped_by, saved=False))

    def _pass_on(self) -> None:
        if self._experiment is None or self.stopped_by is None:
            return
        number = signal.SIGKILL if self._killed else self.stopped_by
        for group in groups(self._experiment):
            with suppress(ProcessLookupError):
                os.killpg(group, number)
        away = [job for job in self._experiment.jobs if not isinstance(job.executor, run.LocalExecutor)]
        for job in away:
            if number != signal.SIGKILL and life_line.pass_on(Path(job.executor.job_dir), number):
                continue
            threading.Thread(target=job.cancel, args=(self._experiment._runner,), daemon=True).start()


def groups(experiment: run.Experiment) -> list[int]:
    """Return the process groups of the tasks that NeMo Run's local scheduler runs for an experiment."""
    scheduler = experiment._runner._scheduler("local_persistent")
    replicas = [one for app in scheduler._apps.values() for role in app.role_replicas.values() for one in role]
    return [replica.proc.pid for replica in replicas if replica.is_alive()]


@contextmanager
def relayed(relay: Relay) -> Iterator[None]:
    """Let ``relay`` have the signals of this process; outside the main thread it gets none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, relay) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
