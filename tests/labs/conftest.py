"""Tests that install packages and start daemons: `make test-all` runs them."""

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.path.name != "test_dockerfile.py":
            item.add_marker(pytest.mark.slow)
