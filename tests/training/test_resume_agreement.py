"""A training state that only some ranks see is refused by all of them; the others would start anew beside it."""

from pathlib import Path

import pytest

from graftwork.errors import CheckpointError
from graftwork.peft import LoRA
from graftwork.training import finetune
from graftwork.training.run_directory import state_path
from tests.helpers import tiny_run
from tests.helpers.distributed import run_ranks


def start(rank: int, world_size: int, data: Path, root: Path) -> str:
    """Start a run whose directory holds a state for rank 0 only; return the error."""
    run = root / f"node{rank}"
    if rank == 0:
        state_path(run, 4).mkdir(parents=True)
    try:
        finetune(tiny_run.model(), tiny_run.trainer(run, world_size), tiny_run.data_module(data), peft=[LoRA(dim=2)])
    except CheckpointError as error:
        return str(error)
    return "trained"


@pytest.mark.fault(
    "half of the ranks resume, the others start from random values",
    "ranks agree on the state before any of them reads it",
)
@pytest.mark.processes
def test_all_ranks_refuse_a_state_that_one_does_not_see(tmp_path: Path) -> None:
    data = tiny_run.write_data(tmp_path)
    errors = run_ranks(start, 2, data, tmp_path / "runs")
    assert errors[0] == errors[1]
    assert "different training states" in errors[0] and "step-00000004" in errors[0] and "None" in errors[0]
