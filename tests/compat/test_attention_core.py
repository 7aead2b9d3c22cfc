"""SDPACoreAttention against the formula written out, for every kind of restriction it takes."""

import itertools
import math

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from graftwork import parallel
from graftwork.core.attention import SDPACoreAttention
from graftwork.core.segments import batches, local_positions, segments
from graftwork.errors import ConfigError, ParallelismError
from tests.helpers import tiny_gpt

HEADS, GROUPS, DIM = 4, 2, 16


@pytest.fixture(autouse=True)
def world():
    parallel.ensure_initialized()
    yield
    parallel.destroy()


def core(mask_type: AttnMaskType = AttnMaskType.causal, **overrides: object) -> SDPACoreAttention:
    cfg = tiny_gpt.config(**overrides)
    return SDPACoreAttention(cfg, 1, mask_type, "self").train(bool(overrides.get("attention_dropout")))


def qkv(sq: int, b: int = 2, sk: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((sq, b, HEADS, DIM), (sk or sq, b, GROUPS, DIM), (sk or sq, b, GROUPS, DIM))
    q, k, v = (torch.randn(shape, generator=g).requires_grad_() for shape in shapes)
    return q, k, v


def formula(q: Tensor, k: Tensor, v: Tensor, forbidden: Tensor | None = None, bias: Tensor | float = 0.0) -> Tensor:
    """Return softmax(q k / sqrt(d) + bias) v with ``forbidden`` True = masked; blind rows give zeros."""
    k, v = (t.repeat_interleave(HEADS // GROUPS, dim=2) for t in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) / math.sqrt(DIM) + bias
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, float("-inf"))
    weights = torch.nan_to_num(scores.softmax(-1))
    return torch.einsum("bhqk,kbhd->qbhd", weights, v).flatten(2)


def future(sq: int, sk: int | None = None) -> Tensor:
    sk = sk or sq
    return ~torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)


def test_causal_with_grouped_queries() -> None:
    q, k, v = qkv(9)
    torch.testing.assert_close(core()(q, k, v), formula(q, k, v, future(9)), atol=1e-6, rtol=1e-5)


def test_a_mask_given_to_a_causal_attention_is_honoured_too() -> None:
    q, k, v = qkv(8)
    padding = torch.zeros(2, 1, 1, 8, dtype=torch.bool)
    padding[0, ..., :3] = True  # left padding: the first rows of the first sequence are blind
    out = core()(q, k, v, padding)
    torch.testing.assert_close(out, formula(q, k, v, padding | future(8)), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(out, core()(q, k, v))


def test_blind_rows_give_zeros_and_finite_gradients() -> None:
    q, k, v = qkv(6)
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, 2] = True
    out = core(AttnMaskType.no_mask)(q, k, v, mask)
    out.square().sum().backward()
    assert torch.equal(out[2, 1], torch.zeros(HEADS * DIM))
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))
    assert torch.equal(q.grad[2, 1], torch.zeros(HEADS, DIM))


def test_a_full_causal_mask_changes_nothing() -> None:
    q, k, v = qkv(7)
    torch.testing.assert_close(core()(q, k, v, future(7)[None, None]), core()(q, k, v), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_attention_bias(mask_type: AttnMaskType) -> None:
    q, k, v = qkv(5)
    bias = torch.randn(1, HEADS, 5, 5, generator=torch.Generator().manual_seed(1))
    forbidden = future(5) if mask_type is AttnMaskType.causal else None
    out = core(mask_type)(q, k, v, attention_bias=bias)
    torch.testing.assert_close(out, formula(q, k, v, forbidden, bias), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sq", [1, 3])
def test_decode_aligns_the_queries_to_the_end_of_the_keys(sq: int) -> None:
    q, k, v = qkv(sq, sk=10)
    # megatron-core passes no_mask in decode: also a piece of several queries must stay causal
    out = core()(q, k, v, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(out, formula(q, k, v, future(sq, 10)), atol=1e-6, rtol=1e-5)


def packed(cu: list[int], padded: list[int] | None = None) -> PackedSeqParams:
    bounds = torch.tensor(cu, dtype=torch.int32)
    starts = None if padded is None else torch.tensor(padded, dtype=torch.int32)
    return PackedSeqParams("thd", bounds, bounds, starts, starts)


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_packed_rows_equal_their_segments_alone(mask_type: AttnMaskType, squeezed: bool) -> None:
    bounds = [0, 3, 20, 21, 21, 25]  # lengths 3, 17, 1, 0, 4
    q, k, v = qkv(25, b=1)
    args = [t.squeeze(1) for t in (q, k, v)] if squeezed else [q, k, v]
    out = core(mask_type)(*args, packed_seq_params=packed(bounds))
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]
    causal = mask_type is AttnMaskType.causal
    alone = [formula(q[s], k[s], v[s], future(s.stop - s.start) if causal else None) for s in spans]
    expected = torch.cat(alone).squeeze(1) if squeezed else torch.cat(alone)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    moved = core(mask_type)(*args, packed_seq_params=packed([0, 4, 20, 21, 21, 25]))
    assert not torch.allclose(out, moved, atol=1e-3), "the boundaries must matter"


def test_packed_gradients_stay_inside_their_segment() -> None:
    q, k, v = qkv(12, b=1)
    core()(q, k, v, packed_seq_params=packed([0, 5, 12]))[:5].square().sum().backward()
    assert float(k.grad[5:].abs().sum()) == 0.0
    assert float(k.grad[:5].abs().sum()) > 0.0


def test_rows_behind_a_padded_segment_are_zero() -> None:
    q, k, v = qkv(8, b=1)
    out = core()(q, k, v, packed_seq_params=packed([0, 3, 6], padded=[0, 4, 8]))
    expected = torch.cat([formula(q[s], k[s], v[s], future(3)) for s in (slice(0, 3), slice(4, 7))])
    torch.testing.assert_close(out[[0, 1, 2, 4, 5, 6]], expected, atol=1e-6, rtol=1e-5)
    assert float(out[[3, 7]].abs().sum().detach()) == 0.0


def test_the_padded_batches_cost_at_most_four_times_the_segments() -> None:
    lengths = [500, *([3] * 200), *([70] * 10), 1]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    row = segments(bounds)
    cost = sum(b.queries.shape[0] * b.queries.shape[1] * b.keys.shape[1] for b in batches(row))
    assert cost <= 4 * sum(n * n for n in lengths) < len(lengths) * max(lengths) ** 2 / 20


def test_dropout_draws_from_the_tensor_parallel_state() -> None:
    q, k, v = qkv(16)
    attention = core(attention_dropout=0.5)
    before = torch.get_rng_state()
    first = attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), before), "the default state must not move"
    assert not torch.allclose(first, attention(q, k, v))
    parallel.seed_rng(1234)
    torch.testing.assert_close(attention(q, k, v), first, atol=0, rtol=0)
    torch.testing.assert_close(attention.eval()(q, k, v), formula(q, k, v, future(16)), atol=1e-6, rtol=1e-5)


def test_zig_zag_positions_cover_the_sequence_once() -> None:
    positions = [local_positions(12, rank, 3) for rank in range(3)]
    assert positions[0].tolist() == [0, 1, 10, 11]
    assert sorted(torch.cat(positions).tolist()) == list(range(12))
    with pytest.raises(ParallelismError, match="multiple of 4"):
        local_positions(6, 0, 2)


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(ConfigError, match="window_size"):
        core(window_size=(4, 0))
