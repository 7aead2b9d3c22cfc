"""initialize, ensure_initialized, destroy: one process leaves nothing behind and can start again; sizes are checked."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from graftwork import parallel
from graftwork.errors import ParallelismError
from tests.helpers.distributed import RankFailed, run_ranks
from tests.helpers.layouts import layout_of


@pytest.fixture(autouse=True)
def clean():
    parallel.destroy()
    yield
    parallel.destroy()


def test_one_process_needs_no_environment_and_leaves_none() -> None:
    before = dict(os.environ)
    parallel.ensure_initialized()
    assert dict(os.environ) == before
    assert dist.get_world_size() == 1
    sizes = (parallel.tp_size(), parallel.pp_size(), parallel.cp_size(), parallel.dp_size(), parallel.ep_size())
    assert sizes == (1, 1, 1, 1, 1)
    assert parallel.is_first_stage() and parallel.is_last_stage()
    assert parallel.tp_group().size() == parallel.model_parallel_group().size() == 1


def test_it_starts_again_after_destroy() -> None:
    for _ in range(3):
        parallel.ensure_initialized()
        assert parallel.is_initialized()
        parallel.destroy()
        assert not parallel.is_initialized()
        assert not dist.is_initialized()


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made anew"])
def test_groups_of_a_destroyed_torch_distributed_are_not_taken_for_live_ones(again: bool) -> None:
    parallel.ensure_initialized()
    dist.destroy_process_group()
    if again:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert not parallel.is_initialized()
    parallel.ensure_initialized()
    assert parallel.is_initialized() and parallel.tp_rank() == parallel.pp_rank() == 0


def test_ensure_leaves_an_existing_state_alone() -> None:
    parallel.ensure_initialized(seed=1)
    group, state = parallel.tp_group(), torch.get_rng_state()
    parallel.ensure_initialized(seed=2)
    assert parallel.tp_group() is group
    assert torch.equal(torch.get_rng_state(), state)


def test_initialize_keeps_groups_of_the_same_sizes_and_seeds_again() -> None:
    parallel.initialize(seed=1)
    group, state = parallel.tp_group(), torch.get_rng_state()
    parallel.initialize(seed=2)
    assert parallel.tp_group() is group
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 2}, "multiple of 2"),
        ({"context": 3}, "multiple of 3"),
        ({"expert": 2}, "expert_model_parallel_size=2"),
        ({"virtual_pipeline": 2}, "virtual"),
        ({"pipeline": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ParallelismError, match=message):
        parallel.initialize(layout_of(**sizes))
    assert not parallel.is_initialized()


def layout(rank: int, world: int, sizes: dict[str, int]) -> dict[str, Any]:
    parallel.initialize(layout_of(**sizes))
    first = {
        "tensor": parallel.tp_rank(),
        "pipeline": parallel.pp_rank(),
        "context": parallel.cp_rank(),
        "data": parallel.dp_rank(),
        "model group": dist.get_process_group_ranks(parallel.model_parallel_group()),
        "data group": dist.get_process_group_ranks(parallel.dp_group(with_context_parallel=True)),
        "stages": (parallel.is_first_stage(), parallel.is_last_stage()),
    }
    parallel.initialize()  # another layout over the same ranks
    assert parallel.dp_size() == world
    return first


@pytest.mark.processes
def test_four_ranks_as_tensor_and_pipeline() -> None:
    ranks = run_ranks(layout, 4, {"tensor": 2, "pipeline": 2})
    assert [(r["tensor"], r["pipeline"], r["data"]) for r in ranks] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert all(r["model group"] == [0, 1, 2, 3] for r in ranks)
    assert [r["stages"] for r in ranks] == [(True, False)] * 2 + [(False, True)] * 2


@pytest.mark.processes
def test_four_ranks_as_context_and_data() -> None:
    ranks = run_ranks(layout, 4, {"context": 2})
    assert [(r["context"], r["data"]) for r in ranks] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(r["data group"] == [0, 1, 2, 3] for r in ranks)


def virtual_stages(rank: int, world: int) -> list[tuple[bool, bool]]:
    parallel.initialize(layout_of(pipeline=2, virtual_pipeline=2))
    return [(parallel.is_first_stage(chunk), parallel.is_last_stage(chunk)) for chunk in range(2)]


@pytest.mark.processes
def test_only_the_outer_virtual_stages_hold_embedding_and_output() -> None:
    assert run_ranks(virtual_stages, 2) == [[(True, False), (False, False)], [(False, False), (False, True)]]


def fails_on_rank_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("rank one says so")
    dist.barrier()


def hangs(rank: int, world: int) -> None:
    if rank == 0:
        dist.recv(torch.zeros(1), src=1)
    else:
        import time

        time.sleep(60)


@pytest.mark.processes
def test_a_failing_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match="rank one says so"):
        run_ranks(fails_on_rank_one, 2)


@pytest.mark.processes
def test_hanging_ranks_are_killed() -> None:
    with pytest.raises(RankFailed, match=r"rank\(s\) \[0, 1\] did not finish within 3 s"):
        run_ranks(hangs, 2, timeout=3)
