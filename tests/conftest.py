"""Shared by all tests: a private NeMo Run home and quiet CPU threads, in this process and in every child."""

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Read when nemo_run is imported, so it is set before any test module is.
os.environ["NEMORUN_HOME"] = tempfile.mkdtemp(prefix="graftwork-nemorun-")


@pytest.fixture(autouse=True, scope="module")
def fresh_state() -> Iterator[None]:
    """Files run in any order and on several workers: none inherits another's parallel state or random numbers."""
    if parallel := sys.modules.get("graftwork.parallel.state"):
        parallel.destroy()
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    yield
