"""The lock on a run directory ends with the run, also while a forked child still lives."""

import multiprocessing
import time
from pathlib import Path

import pytest

from graftwork.errors import ConfigError
from graftwork.training.run_directory import locked


def test_a_forked_child_does_not_hold_the_directory(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        with pytest.raises(ConfigError, match="another run"), locked(tmp_path):
            pass
    try:
        with locked(tmp_path):
            pass
    finally:
        child.kill()
        child.join()
