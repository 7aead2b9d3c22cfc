"""T5 at TP2, TP2 with sequence parallelism and DP2 equals one process: logits, loss, every gradient; recomputed too."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftwork import parallel
from graftwork.batch import IGNORED, Batch
from graftwork.core import records
from graftwork.layout import Layout
from graftwork.models import T5
from graftwork.optim import gradient_of
from graftwork.parallel.record import record_of
from graftwork.peft import LoRA
from graftwork.training.optimizer.gradients import Gradients
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny_t5 import ids, masks, shape

TOLERANCE = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "dp2": {},
}
TABLE = "decoder_relative_pos_emb.relative_attention_bias.weight"
Found = dict[str, Tensor]


def model_of(kind: str, recompute: str | None = None, lora: bool = False) -> T5:
    """Return a random model whose norms are not at ones; its weights do not depend on the layout."""
    model = T5(shape(kind), dtype="fp32", recompute=recompute)
    model.configure_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if lora:
        model.add_adapter(
            LoRA(dim=4, alpha=4, target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
        )
        with torch.no_grad():
            for tensor in model.stack.tensors("lora"):
                sharding = record_of(tensor.parameter).sharding
                full = torch.randn(sharding.shape, generator=torch.Generator().manual_seed(sum(map(ord, tensor.key))))
                tensor.parameter.copy_(0.1 * sharding.take(full, parallel.tp_rank(), parallel.tp_size()))
    return model.train()


def batch() -> Batch:
    """Return four rows of different lengths; odd lengths are no multiple of two ranks."""
    (source, target), (source_mask, target_mask) = ids(), masks()
    labels = target.roll(-1, 1).masked_fill(target_mask == 0, IGNORED)
    rows = torch.tensor([0, 1, 2, 1])
    made = replace(Batch.of(target, labels), source=source[:, :29], source_lengths=source_mask[:, :29].sum(1))
    return made._each(lambda tensor: tensor[rows])


def step(model: T5) -> Found:
    """Return logits, loss and every whole gradient of one step over the global batch."""
    rank, size = parallel.dp_rank(), parallel.dp_size()
    mine = batch()._each(lambda tensor: tensor[rank::size])
    gradients = Gradients(model.chunks)
    output, loss_function = model.forward_step(iter([mine]), model.chunks[0])
    total, count, _ = loss_function(output)
    total.backward()
    sums = torch.stack([total.detach().double(), count.double()])
    dist.all_reduce(sums, group=parallel.dp_group())
    gradients.finish(sums[1])
    found = {name: _whole(p) for name, p in model.chunks[0].named_parameters() if p.requires_grad}
    first = replace(batch(), micro_batch_size=None)
    assert first.source is not None and first.source_lengths is not None
    mask = torch.arange(29) < first.source_lengths[:, None]
    with torch.no_grad():
        logits = model.eval()(first.source, first.tokens, mask.long())
    return {**found, "loss": sums[0], "norm": gradients.norm, "logits": logits}


def _whole(parameter: nn.Parameter) -> Tensor:
    gradient, sharding = gradient_of(parameter), record_of(parameter).sharding
    assert gradient is not None
    if sharding.dim is None:
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(parallel.tp_size())]
    dist.all_gather(parts, gradient.contiguous(), group=parallel.tp_group())
    return sharding.join(parts)


def cases() -> list[dict[str, Any]]:
    """Return the models that are compared in every layout."""
    return [
        {"kind": "t5"},
        {"kind": "mt5", "recompute": "full"},
        {"kind": "t5v11", "lora": True, "recompute": "selective"},
    ]


def two_ranks(rank: int, world_size: int) -> dict[str, list[Found]]:
    found = {}
    for name, sizes in LAYOUTS.items():
        parallel.initialize(Layout(**sizes))
        found[name] = [step(model_of(**case)) for case in cases()]
    records.OF_HEADS = tuple(part for part in records.OF_HEADS if part != "relative_attention_bias")
    parallel.initialize(Layout(**LAYOUTS["tp2"]))
    return {**found, "broken": [step(model_of(kind="t5"))]}


def worst(found: Found, wanted: Found) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {n: float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp(min=1e-30)) for n in wanted}


@pytest.mark.fault(
    "the table of relative positions, one for all tensor-parallel ranks, keeps the gradient of one rank's heads",
    "the record says that its gradient is partial; it is summed over the ranks",
)
@pytest.mark.processes
def test_layouts_equal_one_process() -> None:
    ranks = run_ranks(two_ranks, 2, timeout=240)
    wanted = [step_alone(case) for case in cases()]
    for found in ranks:
        for name in LAYOUTS:
            for case, ours, theirs in zip(cases(), found[name], wanted, strict=True):
                far = {tensor: d for tensor, d in worst(ours, theirs).items() if d > TOLERANCE}
                assert not far, (name, case, far)
        broken = worst(found["broken"][0], wanted[0])
        assert broken[TABLE] > 0.1 and broken["decoder.layers.0.mlp.linear_fc1.weight"] < TOLERANCE


def step_alone(case: dict[str, Any]) -> Found:
    model = model_of(**case)
    return step(model)


@pytest.mark.parametrize("kind", ["t5", "t5v11"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("frozen", [False, True], ids=["everything", "lora"])
def test_recomputation_changes_no_gradient(kind: str, recompute: str, frozen: bool) -> None:
    plain, again = (step(model_of(kind, how, lora=frozen)) for how in (None, recompute))
    assert frozen or (TABLE in plain and bool(plain[TABLE].any()))
    assert max(worst(again, plain).values()) < 1e-6
