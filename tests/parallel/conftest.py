"""Fixtures of the fidelity matrix: checkpoints, the one-process oracle, each layout's ranks (run once), the figures."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from graftwork import parallel
from tests.helpers.distributed import run_ranks
from tests.parallel.cells import Outcome, run_cell, run_cells
from tests.parallel.compare import Figures
from tests.parallel.layouts import LAYOUTS, Cell
from tests.parallel.models import write_checkpoints
from tests.parallel.report import CACHE_KEY

Oracle = Callable[[Cell], Outcome]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tiny Hugging Face checkpoints."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def one_process(checkpoints: Path) -> Oracle:
    """Return a function from a cell to its outcome in one process."""

    @cache
    def outcome(cell: Cell) -> Outcome:
        found = run_cell(0, 1, cell, {}, checkpoints)
        parallel.destroy()
        return found

    return outcome


@pytest.fixture(scope="session")
def in_layout(request: pytest.FixtureRequest, checkpoints: Path) -> Callable[[str, Cell], list[Outcome]]:
    """Return a function from (layout, cell) to what its ranks saw; a layout runs all its chosen cells at once."""
    chosen: dict[str, list[Cell]] = {}
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if {"layout", "cell"} <= set(params) and "breakage" not in params:
            chosen.setdefault(params["layout"], []).append(params["cell"])

    @cache
    def run(layout: str) -> dict[Cell, list[Outcome]]:
        ranks, cells = LAYOUTS[layout], chosen[layout]
        results = run_ranks(run_cells, ranks.world, cells, ranks.sizes, checkpoints, timeout=600)
        return {cell: [result[i] for result in results] for i, cell in enumerate(cells)}

    return lambda layout, cell: run(layout)[cell]


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, Figures]]:
    """Collects "layout/cell" -> figures; they are left in pytest's cache, from which the documentation is written."""
    collected: dict[str, Figures] = {}
    yield collected
    store = getattr(request.config, "cache", None)
    if store is not None and collected:
        store.set(CACHE_KEY, {**store.get(CACHE_KEY, {}), **collected})
