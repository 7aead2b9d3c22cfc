"""The CPU tracker keeps megatron-core's rules: named states, nested forks, ranks that differ where they must."""

from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor

from graftwork import parallel
from graftwork.compat.rng import CPURNGStatesTracker
from tests.helpers import tiny_gpt
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of


@pytest.fixture(autouse=True)
def world():
    parallel.ensure_initialized(seed=7)
    yield
    parallel.destroy()


def tracker() -> CPURNGStatesTracker:
    found = tensor_parallel.get_cuda_rng_tracker()
    assert isinstance(found, CPURNGStatesTracker)
    return found


def test_a_fork_does_not_move_the_outer_state() -> None:
    expected = torch.rand(2, generator=torch.Generator().manual_seed(7))
    with tracker().fork():
        inside = torch.rand(4)
    assert torch.equal(torch.rand(2), expected)
    parallel.seed_rng(7)
    with tracker().fork():
        again = torch.rand(4)
    assert torch.equal(inside, again)


def test_nested_forks_continue_their_own_states() -> None:
    expert = megatron_random.get_expert_parallel_rng_tracker_name()
    with tracker().fork():
        outer = [torch.rand(1)]
        with tracker().fork(expert):
            torch.rand(5)
        outer.append(torch.rand(1))
    parallel.seed_rng(7)
    with tracker().fork():
        flat = torch.rand(1), torch.rand(1)
    assert torch.equal(torch.cat(outer), torch.cat(flat))


def test_a_fork_is_left_cleanly_by_an_exception() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), tracker().fork():
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_and_repeated_states_are_refused() -> None:
    with pytest.raises(KeyError, match="tracked"), tracker().fork("nobody"):
        pass
    with pytest.raises(ValueError, match="repeats"):
        tracker().add("new", 7)


def test_a_forced_reset_keeps_the_cpu_tracker() -> None:
    megatron_random.model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    assert tracker().is_initialized()


def test_data_ranks_differ_only_on_request() -> None:
    parallel.seed_rng(7)
    first = torch.rand(1)
    parallel.seed_rng(7, per_data_rank=True)
    assert torch.equal(torch.rand(1), first), "rank 0 keeps the plain seed"


def draws(rank: int, world: int, sizes: dict[str, int]) -> dict[str, Tensor]:
    parallel.initialize(layout_of(**sizes), seed=7)
    default = torch.rand(3)
    with tracker().fork():
        forked = torch.rand(3)
    parallel.seed_rng(7, per_data_rank=True)
    return {"default": default, "forked": forked, "per data rank": torch.rand(3)}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("sizes", "equal"),
    [
        ({"tensor": 2}, {"default": True, "forked": False, "per data rank": True}),
        ({"pipeline": 2}, {"default": False, "forked": False, "per data rank": False}),
        ({}, {"default": True, "forked": True, "per data rank": False}),
        ({"context": 2}, {"default": True, "forked": True, "per data rank": False}),
    ],
    ids=["tensor", "pipeline", "data", "context"],
)
def test_which_ranks_share_which_state(sizes: dict[str, int], equal: dict[str, bool]) -> None:
    first, second = run_ranks(draws, 2, sizes)
    assert {name: torch.equal(first[name], second[name]) for name in first} == equal


def replicated(rank: int, world: int, sequence_parallel: bool) -> dict[str, Tensor]:
    parallel.initialize(layout_of(tensor=2))
    dropout: dict[str, Any] = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    cfg = tiny_gpt.config(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel, **dropout)
    module = tiny_gpt.build(cfg)
    tokens = torch.arange(2 * tiny_gpt.LENGTH).reshape(2, -1) % tiny_gpt.VOCABULARY
    positions = torch.arange(tiny_gpt.LENGTH).expand(2, -1)
    module(tokens, positions, None, labels=tokens).mean().backward()
    return {n: g for n, g in tiny_gpt.full_gradients(module).items() if "norm" in n}


@pytest.mark.fault(
    "dropout is equal on all ranks, or differs where it must not",
    "one random state per kind of cut",
)
@pytest.mark.processes
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_replicated_parameters_get_one_gradient_under_dropout(sequence_parallel: bool) -> None:
    """Hidden dropout must be equal on tensor ranks (or belong to their own part of the sequence), or these diverge."""
    first, second = run_ranks(replicated, 2, sequence_parallel)
    assert all(torch.allclose(first[n], second[n], atol=1e-6) for n in first)
