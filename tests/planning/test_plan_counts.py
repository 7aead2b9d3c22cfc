"""What a plan counts equals what training counts, what papers say, and formulas of operations written down by hand."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from graftwork import parallel
from graftwork.layout import Layout
from graftwork.models import GPT, T5, Model, shapes
from graftwork.models.shapes import Shape
from graftwork.peft import IA3, PEFT, CanonicalLoRA, LoRA, Selective, report
from graftwork.planning.blueprint import Blueprint
from graftwork.planning.checks import Intent
from graftwork.planning.devices import DEVICES, Device
from graftwork.planning.parameters import held as parameters
from graftwork.planning.plan import Plan, make_plan
from graftwork.planning.workload import Workload
from graftwork.training.summary import count_parameters
from tests.contracts.methods import STACKS, shape
from tests.helpers.tiny_t5 import shape as t5_shape

ROWS = Workload(seq_length=16, micro_batch_size=2, global_batch_size=8)
H100 = [DEVICES["H100"]]


def plan(
    sizes: Shape,
    transforms: list[PEFT],
    layout: Layout | None = None,
    world: int = 1,
    rows: Workload = ROWS,
    recompute: str | None = None,
    dtype: str = "fp32",
    devices: Sequence[Device] = H100,
) -> Plan:
    kind: type[Model] = T5 if sizes.undivided else GPT
    blueprint = Blueprint(kind, sizes, dtype, recompute, transforms)
    return make_plan(Intent(blueprint, layout or Layout(), world, rows), devices)


@pytest.mark.parametrize(("kind", "stack"), [*(("gpt", name) for name in STACKS), ("t5", "lora"), ("t5", "everything")])
def test_counts_equal_what_training_counts(kind: str, stack: str) -> None:
    model = GPT(shape(), dtype="fp32") if kind == "gpt" else T5(t5_shape(), dtype="fp32")
    model.configure_model()
    model.add_adapter(STACKS[stack]())
    trained, total = count_parameters(model)
    rows = ROWS if kind == "gpt" else replace(ROWS, answer_length=8)
    made = plan(model.shape, STACKS[stack](), rows=rows, devices=())
    assert (made.trainable_parameters, made.total_parameters) == (trained, total)
    assert made.sites == tuple(report.sites(model.stack))
    assert not made.problems
    parts = parameters(model)
    assert sum(math.prod(one.shape) for one in parts) == total
    assert sum(math.prod(one.shape) for one in parts if one.trains) == trained


def test_what_stands_on_a_rank_follows_from_the_counts() -> None:
    made = plan(shape(), [LoRA(dim=4)])
    held = made.memory_per_rank[0]
    assert held.weights + held.adapters == 4 * made.total_parameters
    assert (held.gradients, held.optimizer) == (4 * made.trainable_parameters, 8 * made.trainable_parameters)


@pytest.mark.parametrize(("transforms", "shared", "ranks"), [([], None, 4), ([], False, 1), (["lora"], True, 4)])
def test_a_shared_optimizer_stands_on_a_rank_by_its_share(
    transforms: list[str], shared: bool | None, ranks: int
) -> None:
    """Two replicas of two context-parallel ranks; what is summed goes there in fp32 and comes back in bf16."""
    stack = [LoRA(dim=4) for _ in transforms]
    blueprint = Blueprint(GPT, shape(), "bf16", None, stack)
    intent = Intent(blueprint, Layout(context_parallel_size=2), 4, ROWS, shared)
    made, alone = make_plan(intent, H100), make_plan(replace(intent, distributed_optimizer=False), H100)
    state = 8 if stack else 12  # adapters are fp32
    assert made.memory_per_rank[0].optimizer * ranks == state * made.trainable_parameters
    slower = alone.speeds[0].communication / made.speeds[0].communication
    assert slower > 1 if ranks > 1 and not stack else slower == 1


@pytest.mark.parametrize(
    ("sizes", "method", "count"),
    [
        (shapes.gpt3_175b, lambda: CanonicalLoRA(dim=8, target_modules=["linear_q", "linear_v"]), 37_748_736),
        (shapes.t5v11_xl, IA3, 540_672),
        (shapes.llama2_7b, lambda: LoRA(dim=8, target_modules=["linear_qkv"]), 8 * 32 * (4096 + 3 * 4096)),
    ],
)
def test_counts_of_the_papers(sizes: type, method: type, count: int) -> None:
    found = sizes()
    rows = replace(ROWS, answer_length=8) if found.undivided else ROWS
    assert plan(found, [method()], rows=rows, dtype="bf16", devices=()).trainable_parameters == count


def test_layers_without_experts_are_counted_as_what_they_are() -> None:
    mixed = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_layer_freq": [0, 1, 1, 0]}
    sizes, stack = shape(num_layers=4, **mixed), [LoRA(dim=4), IA3()]
    model = GPT(sizes, dtype="fp32")
    model.configure_model()
    model.add_adapter([LoRA(dim=4), IA3()])
    made = plan(sizes, stack, Layout(expert_model_parallel_size=2), world=2)
    assert (made.trainable_parameters, made.total_parameters) == count_parameters(model)
    assert made.sites == tuple(report.sites(model.stack)) and not made.problems
    parts = [one for one in parameters(model) if one.owner is None]
    assert sum(math.prod(one.shape) for one in parts) == sizes.total_parameters()
    assert {one.layer for one in parts if one.expert} == {1, 2}


def test_full_fine_tuning_trains_everything() -> None:
    made = plan(shape(), [], devices=())
    assert made.trainable_parameters == made.total_parameters == shape().total_parameters()


def matrices(sizes: Shape) -> int:
    """Elements of the matrices that every token is multiplied by, output layer included."""
    heads = sizes.num_attention_heads + 2 * sizes.groups
    attention = sizes.hidden_size * sizes.channels * (heads + sizes.num_attention_heads)
    layer = attention + 3 * sizes.hidden_size * sizes.ffn_hidden_size
    return sizes.num_layers * layer + sizes.vocab_size * sizes.hidden_size


def attention(sizes: Shape, length: int) -> float:
    """FLOPs a token of scores and of their products with values, over the pairs that see each other."""
    return sizes.num_layers * 4 * sizes.num_attention_heads * sizes.channels * (length + 1) / 2


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_flops_are_two_for_each_matrix_element_and_pass(recompute: str | None) -> None:
    sizes = shape(num_layers=5)
    full, lora = plan(sizes, [], recompute=recompute), plan(sizes, [LoRA(dim=4)], recompute=recompute)
    assert full.flops is not None and lora.flops is not None
    base, scores, added = 2 * matrices(sizes), attention(sizes, 16), 2 * lora.trainable_parameters
    assert full.flops.forward == pytest.approx(base + scores)
    assert full.flops.data == pytest.approx(base + 2 * scores)
    assert full.flops.weights == pytest.approx(base)
    assert lora.flops.forward == pytest.approx(base + scores + added)
    assert lora.flops.data == pytest.approx(base + 2 * scores + added)
    assert lora.flops.weights == pytest.approx(added)
    output = 2 * sizes.vocab_size * sizes.hidden_size
    again = {None: 0.0, "full": base - output + scores, "selective": scores}[recompute]
    assert full.flops.again == pytest.approx(again)


def test_adapters_in_some_layers_cost_only_there() -> None:
    sizes = shape(num_layers=6)
    some = plan(sizes, [LoRA(dim=4, layers=[1, 4])])
    every = plan(sizes, [LoRA(dim=4)])
    assert some.flops is not None and every.flops is not None
    assert some.flops.weights == pytest.approx(every.flops.weights / 3)
    assert some.memory_per_rank[0].activations < every.memory_per_rank[0].activations


def test_ranks_of_every_layout_hold_the_whole_model_together() -> None:
    sizes = shape(num_layers=4)
    whole = plan(sizes, [LoRA(dim=4), Selective(patterns=["norm"])])
    for layout, world in ((Layout(1, 4), 4), (Layout(1, 2, 2), 2)):
        cut = plan(sizes, [LoRA(dim=4), Selective(patterns=["norm"])], layout, world)
        assert not cut.problems and len(cut.memory_per_rank) == layout.pipeline_model_parallel_size
        for field in ("weights", "adapters", "gradients", "optimizer"):
            parts = [getattr(stage, field) for stage in cut.memory_per_rank]
            assert sum(parts) == getattr(whole.memory_per_rank[0], field), field
    tensor = plan(sizes, [LoRA(dim=4)], Layout(2, sequence_parallel=True), 2)
    assert whole.memory_per_rank[0].weights / 2 < tensor.memory_per_rank[0].weights < whole.memory_per_rank[0].weights


def test_tied_embeddings_stand_on_both_ends_of_a_pipeline() -> None:
    sizes = shape("llama_tied", num_layers=4)
    one, two = plan(sizes, []), plan(sizes, [], Layout(1, 2), 2)
    table = 4 * sizes.vocab_size * sizes.hidden_size
    assert sum(stage.weights for stage in two.memory_per_rank) == one.memory_per_rank[0].weights + table


def test_nothing_is_left_behind() -> None:
    parallel.destroy()
    state = torch.get_rng_state()
    plan(shape(), [LoRA()])
    assert not parallel.is_initialized() and torch.equal(torch.get_rng_state(), state)


def test_a_70b_plan_takes_seconds() -> None:
    sizes, rows = shapes.llama2_70b(), Workload(4096, 1, 8, packing=True)
    started = time.process_time()
    made = plan(sizes, [LoRA()], Layout(8, sequence_parallel=True), 8, rows, "selective", "bf16")
    assert time.process_time() - started < 10  # 2 s alone, 4.6 beside three other processes
    assert 17e9 < made.memory_per_rank[0].weights < 17.5e9 and made.devices[0].fits
    assert made.trainable_parameters == 80 * 32 * (8192 + 10240 + 2 * 8192 + 8192 + 2 * 28672 + 28672 + 8192)


def test_text_and_json_hold_the_figures() -> None:
    made = plan(shape(), [LoRA(dim=4)])
    text, found = str(made), json.loads(made.to_json())
    assert f"trains {made.trainable_parameters:,} of {made.total_parameters:,}" in text and "no problems found" in text
    assert found["trainable_parameters"] == made.trainable_parameters
    assert found["devices"][0]["memory"][0]["total"] == made.memory_per_rank[0].total
