"""Impossible layouts are refused before anything is built, and the message names the field."""

import pytest

from graftwork.errors import ConfigError, ParallelismError
from graftwork.layout import Layout
from graftwork.models.shapes import Shape
from tests.helpers.standin import Rows, StandIn, trainer_for

SHAPE = Shape(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4, vocab_size=96,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size=0"),
        ({"sequence_parallel": True}, "sequence_parallel=True needs tensor_model_parallel_size"),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs pipeline_model_parallel_size > 1"),
    ],
)
def test_sizes_that_no_device_count_could_fit(sizes: dict, field: str) -> None:
    with pytest.raises(ParallelismError, match=field):
        Layout(**sizes)


def test_devices_must_be_a_multiple_of_the_model_ranks() -> None:
    layout = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2)
    assert layout.data_parallel_size(16) == 2
    with pytest.raises(ParallelismError, match=r"12 device\(s\).*multiple of 8"):
        layout.data_parallel_size(12)


def test_experts_must_divide_the_ranks_of_a_stage() -> None:
    assert Layout(expert_model_parallel_size=4).data_parallel_size(8) == 8
    with pytest.raises(
        ParallelismError, match=r"expert_model_parallel_size=3 must divide the 8 .* valid: \[1, 2, 4, 8\]"
    ):
        Layout(expert_model_parallel_size=3).data_parallel_size(8)


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"tensor_model_parallel_size": 3}, r"must divide num_attention_heads=8; valid: \[1, 2, 4, 8\]"),
        ({"tensor_model_parallel_size": 8}, r"must divide num_query_groups=4; valid: \[1, 2, 4\]"),
        ({"pipeline_model_parallel_size": 3}, "num_layers=4"),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}, "num_layers=4"),
        ({"expert_model_parallel_size": 2}, "needs a model with experts"),
    ],
)
def test_layout_must_fit_the_model(sizes: dict, field: str) -> None:
    with pytest.raises(ParallelismError, match=field):
        Layout(**sizes).check_shape(SHAPE)


def test_batch_must_fit_the_replicas_and_the_interleaved_schedule() -> None:
    assert Layout(tensor_model_parallel_size=2).check_batch(16, 2, world=8) == 2
    with pytest.raises(ParallelismError, match="global_batch_size=12 must be a multiple of micro_batch_size=2 x 4"):
        Layout(tensor_model_parallel_size=2).check_batch(12, 2, world=8)
    interleaved = Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(ParallelismError, match="3 microbatches"):
        interleaved.check_batch(3, 1, world=2)


def test_padding_serves_sequence_and_context_parallel_ranks_at_once() -> None:
    assert Layout().pad_to_multiple == 1
    assert Layout(tensor_model_parallel_size=4, sequence_parallel=True).pad_to_multiple == 4
    assert Layout(4, sequence_parallel=True, context_parallel_size=2).pad_to_multiple == 16


def test_strategy_refuses_before_it_builds() -> None:
    module = StandIn()
    module.shape = SHAPE  # type: ignore[assignment]
    with pytest.raises(ParallelismError, match=r"1 device\(s\) cannot be laid out: tensor_model_parallel_size=2"):
        trainer_for({"tensor_model_parallel_size": 2}).fit(module, datamodule=Rows())
    assert not hasattr(module, "module")


def test_strategy_refuses_a_batch_of_the_wrong_size() -> None:
    with pytest.raises(ParallelismError, match="global_batch_size=5"):
        trainer_for({}).fit(StandIn(), datamodule=Rows(global_batch_size=5, micro_batch_size=2))


def test_lightnings_own_accumulation_and_precision_are_refused() -> None:
    with pytest.raises(ConfigError, match="accumulate_grad_batches=2"):
        trainer_for({}, accumulate_grad_batches=2).fit(StandIn(), datamodule=Rows())
    with pytest.raises(ConfigError, match="dtype"):
        trainer_for({}, precision="bf16-true").fit(StandIn(), datamodule=Rows())


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        trainer_for({}).fit(StandIn(train="no such name"), datamodule=Rows())
