"""A real Slurm for the tests of this room, and a training small enough for it."""

import gc
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny_recipe import make_place
from tests.labs.slurm.lab import NoPackagesError, SlurmLab, absent

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NeMo Run's commands read the standard input, which pytest forbids, and leave pipes open."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(scope="session")
def slurm_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """Two nodes that are up; jobs find this repository's tests too."""
    if reason := absent():
        pytest.skip(f"no Slurm is started here: {reason}.")
    try:
        lab = SlurmLab(tmp_path_factory.mktemp("slurm"))
    except NoPackagesError as error:
        pytest.skip(f"no Slurm is started here: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(lab.config))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        try:
            yield lab
        finally:
            lab.close()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint with its tokenizer, and a training file."""
    return make_place(tmp_path_factory.mktemp("place"))
