"""Every layout trains every method as one process does: logits, losses, gradients, trained weights."""

from collections.abc import Callable

import pytest

from tests.parallel.cells import Outcome
from tests.parallel.compare import Figures, assert_faithful, differences
from tests.parallel.layouts import LAYOUTS, Cell, cells_of

CELLS = [pytest.param(layout, cell, id=f"{layout}/{cell}") for layout in LAYOUTS for cell in cells_of(layout)]


@pytest.mark.processes
@pytest.mark.parametrize(("layout", "cell"), CELLS)
def test_layout_equals_one_process(
    layout: str,
    cell: Cell,
    in_layout: Callable[[str, Cell], list[Outcome]],
    one_process: Callable[[Cell], Outcome],
    figures: dict[str, Figures],
) -> None:
    found = differences(in_layout(layout, cell), one_process(cell))
    figures[f"{layout}/{cell}"] = found
    assert_faithful(found)
