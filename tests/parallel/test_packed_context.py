"""Packed rows over context-parallel ranks: how samples are laid, equal work, activation memory that falls."""

from typing import Any

import pytest
import torch

from graftwork import parallel
from graftwork.batch import IGNORED, Batch
from graftwork.core import context_parallel
from graftwork.core.context_parallel import cuttable, slice_batch
from graftwork.core.segments import Segment, batches, row_positions, segments
from graftwork.errors import ParallelismError
from graftwork.models import GPT
from graftwork.peft import LoRA
from graftwork.planning.blueprint import Blueprint, world_of_one
from graftwork.planning.trace import trace
from graftwork.planning.workload import Workload
from graftwork.routes import Routes
from tests.helpers.distributed import run_ranks
from tests.parallel.context_memory import Held, every_size, packed, small

N = IGNORED


def ranks_of(patch: pytest.MonkeyPatch, rank: int, size: int, tensor: int = 1) -> None:
    """Let the code believe that it runs on a rank of a layout."""
    for name, value in {"cp_rank": rank, "cp_size": size, "tp_size": tensor}.items():
        patch.setattr(context_parallel, name, lambda value=value: value)


def test_every_sample_is_made_even_and_the_padding_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_of(monkeypatch, 0, 2)
    found = cuttable(packed([3, 5], tail=4))
    assert found.tokens.tolist() == [[1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 8, 8]]
    assert found.position_ids.tolist() == [[0, 1, 2, 2, 0, 1, 2, 3, 4, 4, 4, 4]]
    assert found.labels.tolist() == [[7, 7, N, N, 7, 7, 7, 7, N, N, N, N]]
    assert found.cu_seqlens.tolist() == [[0, 4, 12]] and found.cu_seqlens.dtype == torch.int32


def test_rows_grow_together_where_the_padding_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_of(monkeypatch, 0, 2, tensor=2)
    parts = [packed([3, 5]), packed([5, 2], tail=1), packed([], tail=8)]
    cu = torch.nn.utils.rnn.pad_sequence([p.cu_seqlens[0] for p in parts], True, padding_value=8)
    tokens, labels, positions = (
        torch.cat([getattr(p, n) for p in parts]) for n in ("tokens", "labels", "position_ids")
    )
    found = cuttable(Batch(tokens, labels, positions, cu_seqlens=cu, micro_batch_size=1))
    assert found.tokens.shape == (3, 16) and [part.sequence_shape for part in found.microbatches()] == [(1, 16)] * 3
    assert [sorted(set(row)) for row in found.cu_seqlens.tolist()] == [[0, 4, 12, 16], [0, 8, 12, 16], [0, 8, 16]]
    assert found.count_targets() == sum(part.count_targets() for part in parts)
    assert int(found.position_ids.max()) <= 7


def test_one_rank_and_padded_rows_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = packed([3, 5])
    parallel.ensure_initialized()
    assert cuttable(batch) is batch and slice_batch(batch) is batch
    parallel.destroy()
    ranks_of(monkeypatch, 0, 2)
    rows = Batch.of(torch.zeros(2, 8, dtype=torch.int64))
    assert cuttable(rows) is rows
    with pytest.raises(ParallelismError, match="a sequence of 3 tokens .* multiple of 4"):
        slice_batch(batch.in_one_line())


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_ranks_are_the_line(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has as many tokens of every sample; labels, positions and routes go where their tokens go."""
    batch = packed([9, 3, 20], tail=2)
    numbers = torch.arange(batch.tokens.shape[1])[None]
    batch.routes = Routes(tuple(frozenset({str(i)}) for i in range(40)), numbers)
    ranks_of(monkeypatch, 0, size)
    line = cuttable(batch).in_one_line()
    parts, of_sample = [], []
    for rank in range(size):
        ranks_of(monkeypatch, rank, size)
        parts.append(slice_batch(line))
        row = segments(line.cu_seqlens)
        of_sample.append([len(row_positions([segment], rank, size)) for segment in row])
        assert parts[-1].cu_seqlens is line.cu_seqlens
        assert torch.equal(parts[-1].routes.chosen, parts[-1].tokens - 1)
    assert all(counts == of_sample[0] for counts in of_sample)
    order = torch.cat([row_positions(segments(line.cu_seqlens), rank, size) for rank in range(size)]).argsort()
    for name in ("tokens", "labels", "position_ids"):
        joined = torch.cat([getattr(part, name) for part in parts], 1)
        assert torch.equal(joined[:, order], getattr(line, name)), name


@pytest.mark.fault(
    "the last of the context-parallel ranks has most of the causal attention to do",
    "each holds one early and one late chunk of every sample; the work of every rank is counted",
)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_rank_attends_to_as_many_keys(size: int) -> None:
    lengths = [2 * size * n for n in (1, 1, 3, 40, 7, 2, 100, 5)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    pairs, cost = [], []
    for rank in range(size):
        groups = batches(segments(bounds), rank, size)
        pairs.append(sum(int((g.allowed(causal=True) & g.real[..., None]).sum()) for g in groups))
        cost.append(sum(g.queries.numel() * g.keys.shape[1] for g in groups))
    assert sum(pairs) == sum(n * (n + 1) // 2 for n in lengths)
    assert len(set(pairs)) == 1, pairs
    # what is computed, masked pairs too: alike on all ranks, and not much more than the causal half
    assert max(cost) <= 1.25 * min(cost) and max(cost) * size <= 1.5 * sum(pairs)
    for rank in range(size):
        alone = [g.queries.numel() * g.keys.shape[1] for g in batches([Segment(0, 64 * size)], rank, size)]
        assert 1 <= sum(alone) / (32 * 32 * (2 * size + 1)) <= 1.25


LENGTHS, ROW = [200, 90, 150, 60], 512


@pytest.fixture(scope="module")
def held() -> list[dict[tuple[int, bool], Held]]:
    """What each of four ranks holds."""
    return run_ranks(every_size, 4, small(ROW), LENGTHS, ROW - sum(LENGTHS))


@pytest.mark.fault(
    "every context-parallel rank keeps the keys and values of all others for its backward pass",
    "they are gathered again; what a rank holds is measured and falls as the ranks grow",
)
@pytest.mark.processes
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_activation_memory_falls_with_the_ranks(size: int, is_packed: bool, held: Any) -> None:
    for rank in held:
        one, found = rank[1, is_packed], rank[size, is_packed]
        assert size * found.saved < 1.02 * one.saved
        assert size * found.peak < 1.05 * one.peak


@pytest.mark.processes
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_plan_says_what_a_rank_holds(size: int, is_packed: bool, held: Any) -> None:
    """Of packs it counts the most that making samples even can take."""
    rows = Workload(ROW, 1, 1, packing=is_packed, samples=len(LENGTHS))
    with world_of_one():
        draft = Blueprint(GPT, small(ROW), "fp32", None, [LoRA(dim=4)]).draft()
        told = trace(draft, rows.microbatch(draft, size), sum(LENGTHS) // size).saved
    most = 1.05 * rows.length(size) / ROW
    for rank in held:
        assert 0.95 * rank[size, is_packed].saved < told < most * rank[size, is_packed].saved
