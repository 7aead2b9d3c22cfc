"""Fixtures of the training tests."""

from pathlib import Path

import pytest

from tests.helpers import tiny_run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and a training file."""
    return tiny_run.write_data(tmp_path_factory.mktemp("tiny_data"))
