"""megatron-core's distributed checkpoints work on gloo: saved on two tensor ranks, read bit for bit on one process."""

import time
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from graftwork import parallel
from tests.helpers import tiny_gpt
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of


def metadata() -> dict[str, object]:
    return {"dp_cp_group": parallel.dp_group(with_context_parallel=True)}


def save(rank: int, world: int, directory: str) -> float:
    parallel.initialize(layout_of(tensor=world))
    module = tiny_gpt.build(tiny_gpt.config(tensor_model_parallel_size=world))
    start = time.monotonic()
    dist_checkpointing.save(module.sharded_state_dict(metadata=metadata()), directory)
    return time.monotonic() - start


@pytest.mark.processes
def test_a_checkpoint_of_two_tensor_ranks_reads_on_one(tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path))
    parallel.ensure_initialized()
    try:
        module = tiny_gpt.build(tiny_gpt.config())
        expected = {name: p.clone() for name, p in module.named_parameters()}
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
        state = dist_checkpointing.load(module.sharded_state_dict(metadata=metadata()), str(tmp_path))
        module.load_state_dict(state)
        assert all(torch.equal(p, expected[name]) for name, p in module.named_parameters())
    finally:
        parallel.destroy()
