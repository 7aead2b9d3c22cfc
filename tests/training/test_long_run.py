"""Flat in the long run: thousands of steps need no more memory, no more open files and no more time than the first."""

import os
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from graftwork.peft import CanonicalAdapter, LoRA
from tests.helpers import tiny_run
from tests.helpers.tiny_run import finetune

STEPS, WARM, EVERY = 2000, 500, 100
GROWTH = 8 * 2**20
"""Bytes that the steps after ``WARM`` may add: a batch kept of each would be 3 MB, a float 0.1 MB."""


class Watch(Callback):
    """Reads resident memory, open files and the processor time of each step; ``leak``: bytes to keep of every step."""

    def __init__(self, leak: int = 0) -> None:
        self.leak, self.kept = leak, [b""]
        self.memory: dict[int, int] = {}
        self.files: dict[int, int] = {}
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._began = process_time()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop it; now and then read the rest."""
        self.seconds.append(process_time() - self._began)
        self.kept.append(b"\1" * self.leak)
        if trainer.global_step % EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory[trainer.global_step] = pages * os.sysconf("SC_PAGE_SIZE")
            self.files[trainer.global_step] = len(os.listdir("/proc/self/fd"))

    @property
    def growth(self) -> int:
        """Bytes that the later steps have added."""
        return self.memory[max(self.memory)] - self.memory[WARM]


def trained(directory: Path, leak: int = 0) -> Watch:
    """Train all steps, with validations, logs and training states on the way."""
    data = tiny_run.write_data(directory)
    watch = Watch(leak)
    options = {"max_steps": STEPS, "val_check_interval": WARM, "limit_val_batches": 1, "enable_progress_bar": False}
    trainer = tiny_run.trainer(directory / "run", callbacks=[watch], **options)
    finetune(tiny_run.model(), trainer, tiny_run.data_module(data), [LoRA(dim=4), CanonicalAdapter(dim=4)])
    return watch


@pytest.mark.slow
def test_two_thousand_steps_are_as_small_and_as_fast_as_the_first(tmp_path: Path) -> None:
    watch = trained(tmp_path)
    assert watch.growth < GROWTH, watch.memory
    assert len({files for step, files in watch.files.items() if step >= WARM}) == 1, watch.files
    early, late = (median(watch.seconds[a : a + WARM]) for a in (WARM, STEPS - WARM))
    assert late < 1.25 * early, (early, late)


@pytest.mark.slow
def test_what_is_kept_of_every_step_is_seen(tmp_path: Path) -> None:
    assert trained(tmp_path, leak=2**13).growth > GROWTH
