"""Recomputation of an encoder and a decoder changes no gradient, not even of the shared tables of positions."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graftwork.batch import IGNORED, Batch
from graftwork.models import T5
from graftwork.optim import gradient_of
from graftwork.peft import LoRA
from tests.contracts.methods import shake
from tests.helpers.tiny_t5 import ids, masks, tiny

TABLE = "decoder_relative_pos_emb.relative_attention_bias.weight"
Found = dict[str, Tensor]


def model_of(kind: str, recompute: str | None = None, lora: bool = False) -> T5:
    """Return a random model, all of which trains, or a shaken LoRA only."""
    model = tiny(kind, recompute=recompute)
    if lora:
        model.add_adapter(
            LoRA(dim=4, alpha=4, target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
        )
        shake(model, 0.1)
    return model.train()


def batch() -> Batch:
    """Return four rows of different lengths."""
    (source, target), (source_mask, target_mask) = ids(), masks()
    labels = target.roll(-1, 1).masked_fill(target_mask == 0, IGNORED)
    rows = torch.tensor([0, 1, 2, 1])
    made = replace(Batch.of(target, labels), source=source[:, :29], source_lengths=source_mask[:, :29].sum(1))
    return made._each(lambda tensor: tensor[rows])


def step(model: T5) -> Found:
    """Return the loss and every gradient of one step."""
    output, loss_function = model.forward_step(iter([batch()]), model.chunks[0])
    total, _, _ = loss_function(output)
    total.backward()
    gradients = {name: gradient_of(p) for name, p in model.chunks[0].named_parameters() if p.requires_grad}
    return {**{name: found for name, found in gradients.items() if found is not None}, "loss": total.detach()}


def worst(found: Found, wanted: Found) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {n: float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp(min=1e-30)) for n in wanted}


@pytest.mark.parametrize("kind", ["t5", "t5v11"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("frozen", [False, True], ids=["everything", "lora"])
def test_recomputation_changes_no_gradient(kind: str, recompute: str, frozen: bool) -> None:
    plain, again = (step(model_of(kind, how, lora=frozen)) for how in (None, recompute))
    assert frozen or (TABLE in plain and bool(plain[TABLE].any()))
    assert max(worst(again, plain).values()) < 1e-6
