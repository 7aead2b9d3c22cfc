"""What cannot work is refused, naming the field, before any weight or process group exists."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from graftwork import parallel
from graftwork.errors import ConfigError, GraftworkError, ParallelismError
from graftwork.layout import refuse_silent_garbage
from graftwork.models import GPT, precision
from tests.contracts.methods import shape
from tests.helpers import tiny_gpt
from tests.helpers.distributed import run_ranks
from tests.helpers.standin import trainer_for
from tests.parallel.models import MIXTURE
from tests.parallel.rows import Rows

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VPP, CP = "virtual_pipeline_model_parallel_size", "context_parallel_size"
EP = "expert_model_parallel_size"
IMPOSSIBLE: list[tuple[dict[str, Any], int, str]] = [
    ({TP: 8}, 8, f"{TP}=8 must divide num_attention_heads=4"),
    ({TP: 4}, 4, f"{TP}=4 must divide num_query_groups=2"),
    ({PP: 4}, 4, f"{PP}=4 .* must divide num_layers=2"),
    ({PP: 2, VPP: 2}, 2, f"{PP}=2 x {VPP}=2 must divide num_layers=2"),
    ({EP: 2}, 2, f"{EP}=2 needs a model with experts"),
    ({TP: 2}, 3, rf"3 device\(s\) cannot be laid out: {TP}=2"),
    ({}, 3, "global_batch_size=8 must be a multiple of micro_batch_size=2 x 3"),
]


@pytest.fixture(autouse=True)
def no_parallel_state() -> None:
    if parallel.is_initialized():
        parallel.destroy()


def refused(model: GPT, sizes: dict[str, Any], world: int, data: Any = None) -> str:
    """Return the sentence; nothing has been built."""
    with pytest.raises(ParallelismError) as refusal:
        trainer_for(sizes, world).fit(model, datamodule=data or Rows())
    assert model.module is None and not parallel.is_initialized()
    return str(refusal.value)


@pytest.mark.parametrize(("sizes", "world", "sentence"), IMPOSSIBLE)
def test_impossible_arithmetic(sizes: dict[str, Any], world: int, sentence: str) -> None:
    assert re.search(sentence, refused(GPT(shape()), sizes, world))


def test_mlp_width_experts_and_their_sequence() -> None:
    assert f"{TP}=2 must divide ffn_hidden_size=47" in refused(GPT(shape(ffn_hidden_size=47)), {TP: 2}, 2)
    assert f"{EP}=3 must divide num_moe_experts=4" in refused(GPT(MIXTURE), {EP: 3}, 3)
    assert "only if sequence_parallel=True" in refused(GPT(MIXTURE), {TP: 2}, 2)


def test_interleaved_stages_need_whole_rounds_of_microbatches() -> None:
    data = Rows()
    data.global_batch_size = 6
    sentence = refused(GPT(shape(num_layers=4)), {PP: 2, VPP: 2}, 2, data)
    assert "3 microbatches" in sentence and "change global_batch_size" in sentence


def test_packed_rows_that_cannot_be_cut() -> None:
    data = Rows()
    data.packing, data.seq_length = True, 15  # type: ignore[attr-defined]
    assert f"seq_length=15 must be a multiple of 2 x {CP}=2, over" in refused(GPT(shape()), {CP: 2}, 2, data)
    sentence = refused(GPT(shape()), {TP: 2, "sequence_parallel": True}, 2, data)
    assert f"seq_length=15 must be a multiple of {TP}=2" in sentence
    sentence = refused(GPT(shape()), {TP: 2, "sequence_parallel": True, CP: 2}, 4, data)
    assert f"2 x {CP}=2 x {TP}=2" in sentence and "valid: multiples of 8" in sentence


BUILDABLE: dict[str, Any] = {
    "expert_tensor_parallel_size": 1,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "overlap_p2p_comm": True,
    "batch_p2p_comm": False,
}


@pytest.mark.fault(
    "a layout that megatron-core computes wrongly (expert adapters over expert-tensor ranks) is accepted",
    "refused before the model is built",
)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"overlap_p2p_comm": False, "batch_p2p_comm": True}, "batch_p2p_comm=False"),
        ({"pipeline_dtype": torch.bfloat16}, "pipeline_dtype=torch.bfloat16 must be torch.float32"),
        ({"fp32_residual_connection": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}, "must"),
        ({"num_moe_experts": 4, "expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size=2 must be 1"),
    ],
)
def test_what_megatron_core_would_compute_wrongly_without_an_error(fields: dict[str, Any], named: str) -> None:
    good = SimpleNamespace(**vars(tiny_gpt.config()) | BUILDABLE)
    refuse_silent_garbage(good)
    with pytest.raises(ParallelismError, match=named):
        refuse_silent_garbage(SimpleNamespace(**vars(good) | fields))


def test_every_layout_builds_experts_whole_and_sends_what_it_computes() -> None:
    """The fields that the refusals read exist under these names in megatron-core."""
    config = MIXTURE.transformer_config(tensor_model_parallel_size=2, sequence_parallel=True)
    assert isinstance(config, TransformerConfig) and config.expert_tensor_parallel_size == 1
    assert {"overlap_p2p_comm", "batch_p2p_comm", "fp32_residual_connection", "pipeline_dtype"} <= set(vars(config))


def other_dtype(rank: int, world_size: int) -> str:
    """Ask for the machine's fast dtype; the second rank's machine is of another kind."""
    precision.bf16_is_fast = lambda: rank == 1
    return _sentence(lambda: precision.common_dtype("auto", None))


def _sentence(call: Callable[[], Any]) -> str:
    try:
        call()
    except GraftworkError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.processes
def test_ranks_of_different_dtypes_are_all_refused() -> None:
    first, second = run_ranks(other_dtype, 2)
    assert first == second and first.startswith(ConfigError.__name__)
    assert "dtype" in first and "rank 0: float32" in first and "rank 1: bfloat16" in first
