"""A training state that only some ranks see is refused by all of them; the others would start anew beside it."""

import os
from pathlib import Path

import pytest

from graftwork.errors import CheckpointError, TrainingError
from graftwork.peft import LoRA
from graftwork.training.optimizer import Update
from graftwork.training.run_directory import state_path
from graftwork.training.state import checkpoint
from tests.helpers import tiny_run
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny_run import finetune


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


def keep_random(rank: int, world_size: int, data: Path, run: Path) -> str:
    """Make a step and a state; resume from it with the second rank's weights as they were drawn; return the error."""
    os.environ["LOCAL_RANK"] = str(rank)
    finetune(
        tiny_run.model(), tiny_run.trainer(run, world_size, max_steps=1), tiny_run.data_module(data), [LoRA(dim=2)]
    )
    exact, model = checkpoint.read_weights, tiny_run.model()

    def read(path: Path, state: checkpoint.Facts, update: Update) -> None:
        held = [p for p in model.parameters() if p.requires_grad]
        drawn = [p.detach().clone() for p in held]
        exact(path, state, update)
        for parameter, value in zip(held, drawn) if rank else ():
            parameter.data.copy_(value)

    checkpoint.read_weights = read
    try:
        finetune(model, tiny_run.trainer(run, world_size, max_steps=2), tiny_run.data_module(data), [LoRA(dim=2)])
    except TrainingError as error:
        return str(error)
    return "trained"


@pytest.mark.fault(
    "half of the ranks are resumed from random initial values",
    "what trains is compared over the ranks that hold the same",
)
@pytest.mark.processes
def test_a_rank_that_starts_from_random_values_is_noticed(tmp_path: Path) -> None:
    data = tiny_run.write_data(tmp_path)
    errors = run_ranks(keep_random, 2, data, tmp_path / "run")
    assert errors[0] == errors[1] and errors[0].startswith("data-parallel ranks disagree on"), errors
