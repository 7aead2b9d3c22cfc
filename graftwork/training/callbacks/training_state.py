"""Saves the training state now and then, and when the run is asked to stop."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Optional

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from graftwork.endings import STOPPED_AT_ONCE, STOPPING, Interrupted, code_of, say
from graftwork.errors import ConfigError
from graftwork.training.callbacks.ranks import largest
from graftwork.training.run_directory import prune, state_path


class TrainingState(Checkpoint):
    """Keeps the newest states in ``checkpoints/`` of the run directory.

    On SIGTERM, SIGUSR1 (Slurm's warning before a time limit) or Ctrl-C the step in progress is finished (and the
    validation that is due after it), the state saved and the process ends with exit code 75, after Ctrl-C with 130. A
    second Ctrl-C stops at once.

    Args:
        every_n_steps: Save after every so many steps; None for never.
        every_n_minutes: Save when so many minutes have passed since the last save; None for never.
        keep: Number of states to keep.
    """

    def __init__(
        self, every_n_steps: Optional[int] = None, every_n_minutes: Optional[float] = 10.0, keep: int = 2
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes), ("keep", keep)):
            if value is not None and value <= 0:
                raise ConfigError(f"TrainingState({name}={value}) must be above 0.")
        self.every_n_steps, self.every_n_minutes, self.keep = every_n_steps, every_n_minutes, keep
        self._told = self._asked = 0
        self._wanted = False
        self._last_save = time.monotonic()
        self._saved_step = -1

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from the start."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, and count time from here; a restored state need not be saved again."""
        self._listen()
        self._last_save, self._saved_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Save when it is time, stop when asked to: after the validation if one is due now. All ranks decide alike."""
        asked, wanted = largest([self._told, self._due(trainer.global_step)])
        self._asked, self._wanted = int(asked), bool(wanted)
        if not _validation_is_due(trainer):
            self._settle(trainer)
        elif self._asked:  # the time that is left may be shorter than the validation
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the validation's result: a resumed run does not validate this step again."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._settle(trainer)

    def _settle(self, trainer: Trainer) -> None:
        # The last step's state follows the checks and the result: whoever resumes from it does not check again.
        if self._asked or (self._wanted and trainer.global_step != trainer.max_steps):
            self.save(trainer)
        if self._asked:
            sentence = (
                f"stopped after step {trainer.global_step}, its state is saved; the same command goes on from there"
            )
            raise Interrupted(sentence, self._asked)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say after what the run has stopped, and how to go on."""
        if isinstance(exception, Interrupted) and trainer.is_global_zero:
            exception.tell()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, so that a finished run can be continued with more steps."""
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, then delete the states that are too old."""
        root = Path(trainer.default_root_dir).resolve()
        trainer.save_checkpoint(state_path(root, trainer.global_step), weights_only=False)
        self._last_save, self._saved_step, self._wanted = time.monotonic(), trainer.global_step, False
        if trainer.is_global_zero:
            prune(root, self.keep)

    def _due(self, step: int) -> bool:
        by_step = self.every_n_steps is not None and step % self.every_n_steps == 0
        waited = time.monotonic() - self._last_save
        return by_step or (self.every_n_minutes is not None and waited >= 60 * self.every_n_minutes)

    def _listen(self) -> None:
        # Lightning's own handler (put back by it at the end) broadcasts inside the signal handler, in the middle of
        # whatever collective is running; here a signal only leaves a note.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        code = code_of(number, saved=True)
        if number == signal.SIGINT and self._told == code:
            raise Interrupted(STOPPED_AT_ONCE, code)
        if number == signal.SIGINT:
            say(STOPPING)
        self._told = max(self._told, code)


def _validation_is_due(trainer: Trainer) -> bool:
    # Lightning skips a validation that was due at the step of a state saved here, so such a state waits for it.
    loop = trainer.fit_loop
    fetcher, epoch = loop._data_fetcher, loop.epoch_loop
    enabled = trainer.enable_validation and not epoch.val_loop.skip
    return enabled and fetcher is not None and epoch._should_check_val_fx(fetcher)
