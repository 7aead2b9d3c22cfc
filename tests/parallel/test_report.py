"""docs/parallelism.md lists exactly the cells of the matrix, and no figure above the tolerance."""

import re

from tests.parallel.compare import TOLERANCE
from tests.parallel.layouts import LAYOUTS, cells_of
from tests.parallel.report import PAGE, blank, section


def test_the_page_lists_exactly_the_cells_that_exist() -> None:
    assert blank(PAGE.read_text()) == blank(section(lambda layout, cell: "0"))


def test_every_cell_is_in_a_table_once() -> None:
    listed: list[str] = []
    section(lambda layout, cell: listed.append(f"{layout}/{cell}") or "0")  # type: ignore[func-returns-value]
    assert sorted(listed) == sorted(f"{layout}/{cell}" for layout in LAYOUTS for cell in cells_of(layout))


def test_no_figure_is_above_the_tolerance() -> None:
    page = PAGE.read_text()
    found = [float(number) for number in re.findall(r"\d\.\de-\d\d", page)]
    assert found and max(found) <= TOLERANCE
    assert blank(page.replace("| LoRA |", "| LoRa |")) != blank(page), "the comparison sees a renamed row"
