"""What a training step computes, by torch's own counter: no method more than its arithmetic asks for."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graftwork.batch import Batch
from graftwork.models import GPT
from graftwork.peft import PEFT, LoRA
from tests.contracts.methods import STACKS, VOCABULARY, prompted, shape, tokens

SIZES = {"num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 160}
ROWS, LENGTH = 4, 48
ONEDNN = torch.ops.mkldnn._linear_pointwise
"""The product of the loss on a CPU, which the counter does not know."""


def _of_product(hidden: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


def model_with(stack: list[PEFT]) -> GPT:
    model = GPT(shape(**SIZES), dtype="fp32")
    model.configure_model()
    if stack:
        model.add_adapter(stack)
    return model.train()


def counted(model: GPT, learns: bool = True) -> int:
    """FLOPs of matrix products in one step with a target everywhere (the counter knows no attention on a CPU)."""
    ids = prompted(model, tokens(ROWS, LENGTH))
    batch = Batch.of(ids, torch.full_like(ids, 5))
    counting = FlopCounterMode(display=False, custom_mapping={ONEDNN: _of_product})
    with counting as counter, torch.set_grad_enabled(learns):
        output, read = model.forward_step(iter([batch]), model.chunks[0])
        total = read(output)[0]
        if learns:
            total.backward()
    return counter.get_total_flops()


def matrices(model: GPT) -> int:
    """FLOPs of one pass of every position, virtual ones too, through the base's matrices."""
    length = prompted(model, tokens(ROWS, LENGTH)).shape[1]
    layer = sum(p.numel() for n, p in model.module.decoder.named_parameters() if p.dim() == 2 and "adapters" not in n)
    return 2 * ROWS * length * (layer + VOCABULARY * SIZES["hidden_size"])


def test_a_forward_pass_and_full_fine_tuning_are_the_known_multiples_of_the_matrices() -> None:
    model = model_with([])
    assert counted(model, learns=False) == matrices(model)
    assert counted(model) <= 3 * matrices(model)


@pytest.mark.parametrize("stack", [name for name in STACKS if name != "everything"])
def test_a_step_takes_what_its_method_asks_for(stack: str) -> None:
    """The base once forward and once for gradients of its inputs, what is added three times, a tenth above it."""
    model = model_with(STACKS[stack]())
    base = matrices(model)
    added = counted(model, learns=False) - base
    assert added >= 0
    assert counted(model) <= 1.10 * (2 * base + 3 * added)


def test_the_upper_half_alone_takes_little_more_than_half() -> None:
    """A full step passes each matrix three times; a frozen lower half is passed once, the upper half twice."""
    upper = model_with([LoRA(dim=4, layers=list(range(4, 8)))])
    assert counted(upper) <= 0.56 * counted(model_with([]))
