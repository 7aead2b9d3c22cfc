"""The stream of rows: a function of (seed, pass), every row once a pass, resumable by one number."""

import numpy
import pytest

from graftwork.data.sampler import RowStream, in_order, shuffled
from graftwork.errors import DataError


def take(stream: RowStream, batches: int) -> list[int]:
    return [row for i in range(batches) for row in stream.batch(i * stream.global_batch_size)]


def test_every_pass_shows_every_row_once_and_no_step_is_short():
    seen = take(RowStream(10, 4, seed=1), batches=5)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert len(RowStream(10, 4, seed=1)) == 3


def test_order_depends_on_seed_and_pass_alone():
    assert take(RowStream(10, 4, 1), 5) == take(RowStream(10, 2, 1), 10)  # not on the batch size
    assert take(RowStream(10, 4, 1), 5) != take(RowStream(10, 4, 2), 5)
    # Fixed figures: a resumed run on another machine or NumPy must see the same rows.
    assert shuffled(10, 1234, 0).tolist() == numpy.argsort(numpy.random.PCG64([1234, 0]).random_raw(10)).tolist()
    assert shuffled(6, 1234, 0).tolist() == FIXED[0] and shuffled(6, 1234, 1).tolist() == FIXED[1]


FIXED = ([5, 3, 4, 1, 2, 0], [2, 0, 1, 4, 5, 3])


def test_fewer_rows_than_a_batch():
    stream = RowStream(3, 8, seed=0)
    assert len(stream) == 1
    assert len(stream.batch(0)) == 8
    assert sorted(stream.batch(0)[:3]) == sorted(stream.batch(0)[3:6]) == [0, 1, 2]


def test_state():
    stream = RowStream(10, 4, seed=1)
    stream.consumed_samples = 12
    again = RowStream(10, 2, seed=1)  # another batch size goes on at the same row
    again.load_state_dict(stream.state_dict())
    assert again.consumed_samples == 12
    with pytest.raises(DataError, match="number of training rows .* was 10 .* now it is 11"):
        RowStream(11, 4, seed=1).load_state_dict(stream.state_dict())
    with pytest.raises(DataError, match="data seed was 1 .* now it is 2"):
        RowStream(10, 4, seed=2).load_state_dict(stream.state_dict())


def test_overfitting_keeps_file_order():
    assert RowStream(10, 4, seed=1, overfit=True).batch(0) == [0, 1, 2, 3]


def test_in_order_fills_the_last_batch_to_whole_microbatches():
    assert in_order(7, 4, step=2) == [[0, 1, 2, 3], [4, 5, 6, -1]]
    assert in_order(5, 4, step=4) == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert in_order(8, 4, step=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert in_order(0, 4, step=2) == []
