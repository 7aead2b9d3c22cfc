"""Loss and gradients under every parallel layout equal one process, through megatron-core's own schedules."""

import sys
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from graftwork import parallel
from graftwork.core.segments import segments
from tests.helpers import tiny_gpt
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.zigzag import local_rows

MICROBATCHES, ROWS = 4, 2
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"sizes": {"tensor": 2}}),
    "tensor+sequence": (2, {"sizes": {"tensor": 2}, "config": {"sequence_parallel": True}}),
    "pipeline": (2, {"sizes": {"pipeline": 2}}),
    "pipeline tied": (2, {"sizes": {"pipeline": 2}, "tied": True}),
    "pipeline virtual": (2, {"sizes": {"pipeline": 2, "virtual_pipeline": 2}}),
    "data": (2, {"sizes": {}}),
    "context": (2, {"sizes": {"context": 2}}),
    "context packed": (2, {"sizes": {"context": 2}, "packed": True}),
    "expert": (2, {"sizes": {"expert": 2}, "config": MOE}),
    "expert allgather": (2, {"sizes": {"expert": 2}, "config": MOE | {"moe_token_dispatcher_type": "allgather"}}),
    "tensor+sequence expert": (2, {"sizes": {"tensor": 2, "expert": 2}, "config": MOE | {"sequence_parallel": True}}),
    "tensor pipeline": (4, {"sizes": {"tensor": 2, "pipeline": 2}}),
    "tensor+sequence context": (4, {"sizes": {"tensor": 2, "context": 2}, "config": {"sequence_parallel": True}}),
}
CU_SEQLENS = torch.tensor([0, 12, 16, 32, 52, 64], dtype=torch.int32)


def _config(sizes: dict[str, int], overrides: dict[str, Any]) -> Any:
    virtual = sizes.get("virtual_pipeline")
    return tiny_gpt.config(
        tensor_model_parallel_size=sizes.get("tensor", 1),
        pipeline_model_parallel_size=sizes.get("pipeline", 1),
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=sizes.get("context", 1),
        expert_model_parallel_size=sizes.get("expert", 1),
        expert_tensor_parallel_size=1,
        # gloo's batched p2p silently delivers garbage to interleaved stages on two ranks
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        **overrides,
    )


def _forward_step(packed: bool) -> Any:
    def step(iterator: Any, module: Any) -> Any:
        tokens, labels, positions = next(iterator)
        row = segments(CU_SEQLENS) if packed else None
        tokens, labels, positions = (
            local_rows(t, 1, parallel.cp_rank(), parallel.cp_size(), row) for t in (tokens, labels, positions)
        )
        params = PackedSeqParams("thd", CU_SEQLENS, CU_SEQLENS, max_seqlen_q=32, max_seqlen_kv=32) if packed else None
        out = module(tokens, positions, None, labels=labels, packed_seq_params=params)

        def loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            total = losses.sum()
            return total / parallel.cp_size(), {"loss": total.detach().clone()}

        return out, loss

    return step


def _microbatches(packed: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    data = torch.randint(0, tiny_gpt.VOCABULARY, (MICROBATCHES, ROWS, tiny_gpt.LENGTH + 1), generator=generator)
    positions = torch.arange(tiny_gpt.LENGTH).expand(ROWS, -1)
    triples = [(d[:, :-1].contiguous(), d[:, 1:].contiguous(), positions) for d in data]
    return [tuple(t.reshape(1, -1) for t in triple) for triple in triples] if packed else triples  # type: ignore


def gradients(
    rank: int,
    world: int,
    sizes: dict[str, int],
    config: dict[str, Any] | None = None,
    tied: bool = False,
    packed: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Return the summed loss (of every row this rank saw the loss of) and the full gradients this rank knows."""
    parallel.initialize(layout_of(**sizes))
    cfg = _config(sizes, config or {})
    chunks = range(sizes["virtual_pipeline"]) if "virtual_pipeline" in sizes else [None]
    modules = [tiny_gpt.build(cfg, vp_stage=chunk, tied=tied) for chunk in chunks]
    mine = _microbatches(packed)[parallel.dp_rank() :: parallel.dp_size()]
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step(packed),
        data_iterator=[iter(mine) for _ in modules] if len(modules) > 1 else iter(mine),
        model=modules if len(modules) > 1 else modules[0],
        num_microbatches=len(mine),
        seq_length=tiny_gpt.LENGTH,
        micro_batch_size=ROWS,
        forward_only=False,
    )
    known: dict[str, Tensor] = {}
    for module in modules:
        known |= tiny_gpt.full_gradients(module, tied)
    # the schedule divides by the number of microbatches
    return sum(float(entry["loss"]) for entry in losses), {name: g * len(mine) for name, g in known.items()}


_reference: dict[str, tuple[float, dict[str, Tensor]]] = {}


def reference(case: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    options = {name: value for name, value in case.items() if name != "sizes"}
    options["config"] = {k: v for k, v in options.get("config", {}).items() if k != "sequence_parallel"}
    key = repr(sorted(options.items()))
    if key not in _reference:
        _reference[key] = gradients(0, 1, {}, **options)
        parallel.destroy()
    return _reference[key]


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((g - expected[n]).abs().max() / expected[n].abs().max()) for n, g in found.items())


@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_one_process(name: str) -> None:
    world, case = CASES[name]
    loss, expected = reference(case)
    options = (case["sizes"], case.get("config"), case.get("tied", False), case.get("packed", False))
    results = run_ranks(gradients, world, *options)
    known = set().union(*(found for _, found in results))
    assert known == set(expected)
    for _, found in results:
        assert worst_difference(found, expected) < 5e-6
    model = case["sizes"].get("tensor", 1) * case["sizes"].get("pipeline", 1) * case["sizes"].get("context", 1)
    seen = [total for total, found in results if total]
    if model == world and "context" not in case["sizes"]:
        assert all(total == pytest.approx(loss, rel=1e-6) for total in seen)


def test_the_comparison_sees_one_changed_token() -> None:
    _, expected = reference({})
    changed = _microbatches(packed=False)
    changed[0][0][0, 3] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "_microbatches", lambda packed: changed)
        _, found = gradients(0, 1, {})
    parallel.destroy()
    assert worst_difference(found, expected) > 1e-3
