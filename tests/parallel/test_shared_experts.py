"""Experts that share factors while their layer is cut over tensor- and expert-parallel ranks at once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.distributed import run_ranks
from tests.parallel.cells import Outcome, run_cells
from tests.parallel.compare import TOLERANCE, assert_faithful, differences
from tests.parallel.layouts import LAYOUTS, Cell

CELL = Cell("mixture", "shared experts")


@pytest.mark.processes
@pytest.mark.parametrize("breakage", ["", "drop_the_sequence_sum"])
def test_each_rank_sees_some_tokens_of_some_experts(
    breakage: str, checkpoints: Path, one_process: Callable[[Cell], Outcome]
) -> None:
    ranks = run_ranks(run_cells, 2, [CELL], LAYOUTS["tp2_sp_ep2"].sizes, checkpoints, breakage)
    found = differences([rank[0] for rank in ranks], one_process(CELL))
    if breakage:
        assert found["gradients"] > 100 * TOLERANCE
    else:
        assert_faithful(found)
