"""The tensors of a step: labels already shifted, positions restart, boundaries as the attention wants them."""

import numpy
import pytest
import torch

from graftwork.data.collate import Collator, round_up
from graftwork.data.rows import Sample


def sample(row: int, tokens: list[int], labels: list[int]) -> Sample:
    return Sample(numpy.array(tokens), numpy.array(labels), row)


A = sample(4, [11, 12, 13], [-100, 13, -100])
B = sample(7, [21, 22], [22, -100])


def test_padded():
    batch = Collator(pad=9, micro_batch_size=1, packed=False)([[A], [B], []], length=4)
    assert batch.tokens.tolist() == [[11, 12, 13, 9], [21, 22, 9, 9], [9, 9, 9, 9]]
    assert batch.labels.tolist() == [[-100, 13, -100, -100], [22, -100, -100, -100], [-100] * 4]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch.rows.tolist() == [[4], [7], [-1]]
    assert (batch.packed, batch.micro_batch_size) == (False, 1)
    assert batch.cu_seqlens is None


def test_packed():
    batch = Collator(pad=9, micro_batch_size=2, packed=True)([[A, B], [B], []], length=6)
    assert batch.tokens.tolist() == [[11, 12, 13, 21, 22, 9], [21, 22, 9, 9, 9, 9], [9] * 6]
    assert batch.labels.tolist()[0] == [-100, 13, -100, 22, -100, -100]  # 13 does not predict B's first token
    assert batch.position_ids.tolist()[:2] == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch.cu_seqlens.tolist() == [[0, 3, 5, 6], [0, 2, 6, 6], [0, 6, 6, 6]]
    assert batch.rows.tolist() == [[4, 7], [7, -1], [-1, -1]]
    assert (batch.packed, batch.micro_batch_size) == (True, 2)


def test_a_full_row_has_no_tail_segment():
    assert Collator(9, 1, True)([[A, B]], length=5).cu_seqlens.tolist() == [[0, 3, 5]]


@pytest.mark.parametrize("packed", [False, True])
def test_types(packed):
    batch = Collator(9, 1, packed)([[A]], length=3)
    assert {getattr(batch, k).dtype for k in ("tokens", "labels", "position_ids", "rows")} == {torch.int64}
    assert not packed or batch.cu_seqlens.dtype == torch.int32


def test_round_up():
    assert [round_up(n, 4) for n in (1, 4, 5)] == [4, 4, 8]
