"""What a microbatch holds without memory equals what it holds with it; few layers stand for many."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graftwork.batch import IGNORED, Batch
from graftwork.layout import Layout
from graftwork.models import GPT, T5, Model
from graftwork.models.recompute import start_gradients
from graftwork.peft import LoRA
from graftwork.planning import activations
from graftwork.planning.blueprint import Blueprint, world_of_one
from graftwork.planning.parameters import held
from graftwork.planning.samples import kinds_of, sample
from graftwork.planning.trace import trace
from graftwork.planning.workload import Workload
from tests.contracts.methods import STACKS, shape
from tests.helpers.tiny_t5 import shape as t5_shape

ROWS = Workload(seq_length=16, micro_batch_size=2, global_batch_size=2)


def saved_by_a_real_pass(model: Model, batch: Batch) -> int:
    """Bytes of all storages, beside the parameters', that autograd keeps of a real forward pass."""
    mine = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, loss = model.forward_step(iter([batch]), model.chunks[0])
        kept = loss(output)[0]
    del output
    assert kept.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("stack", ["lora", "canonical", "ia3", "dora"])
def test_bytes_saved_are_those_that_a_real_pass_saves(stack: str) -> None:
    sizes = shape(num_layers=3, hidden_size=64, ffn_hidden_size=160)
    model = GPT(sizes, dtype="fp32")
    model.configure_model()
    model.add_adapter(STACKS[stack]())
    model.train()
    model.module.embedding.register_forward_hook(start_gradients)  # a plan does not look where the lowest adapter is
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    labels = tokens.masked_fill(torch.arange(16) < 6, IGNORED)
    real = saved_by_a_real_pass(model, Batch.of(tokens, labels))
    with world_of_one():
        draft = Blueprint(GPT, sizes, "fp32", None, STACKS[stack]()).draft()
        found = trace(draft, ROWS.microbatch(draft), targets=20)
    # beside them stand what Python still holds (the batch, the mask of padding) and what views share
    assert found.saved == pytest.approx(real, rel=0.05)
    assert found.peak > found.saved


@pytest.mark.parametrize(
    ("stack", "recompute"), [("lora", None), ("lora", "full"), ("lora", "selective"), ("dora", None), ("tasks", "full")]
)
def test_few_layers_stand_for_many(stack: str, recompute: str | None) -> None:
    few_equal_many(Blueprint(GPT, shape(num_layers=5), "fp32", recompute, STACKS[stack]()), ROWS)


@pytest.mark.parametrize("recompute", ["full"])
def test_few_layers_of_each_stack_stand_for_many(recompute: str | None) -> None:
    sizes = t5_shape(num_layers=4, num_decoder_layers=3)
    few_equal_many(Blueprint(T5, sizes, "fp32", recompute, [LoRA(dim=4)]), replace(ROWS, answer_length=12))


def few_equal_many(blueprint: Blueprint, rows: Workload) -> None:
    with world_of_one():
        whole = blueprint.draft()
        kinds = kinds_of(held(whole))
        found = activations.measure(sample(blueprint, kinds), rows, Layout())
        peak = trace(whole, rows.microbatch(whole), rows.targets()).peak
        saved = trace(whole, rows.microbatch(whole), targets=1).saved
    layers = [(kind.part, index) for kind in kinds for index in kind.layers]
    assert found.of(layers) + found.outside == pytest.approx(saved)
    assert found.of(layers) + found.outside + found.transient + found.logits == pytest.approx(peak, rel=0.001)


def test_nothing_is_held_when_a_trace_is_over() -> None:
    with world_of_one():
        draft = Blueprint(GPT, shape(), "fp32", None, [LoRA(dim=4)]).draft()
        trace(draft, ROWS.microbatch(draft), 8)  # which fills caches of the rotary positions
        second = trace(draft, ROWS.microbatch(draft), 8)
        gc.collect()
        assert trace(draft, ROWS.microbatch(draft), 8) == second
        assert all(p.grad is None for p in draft.parameters())
