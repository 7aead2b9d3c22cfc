"""The one-process run that every layout is compared with equals a plain torch loop over the model's logits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork import parallel
from graftwork.batch import IGNORED, Batch
from graftwork.models.base import Model
from graftwork.peft import PromptTuning, PTuning
from tests.parallel.cells import CLIP, LEARNING, Outcome
from tests.parallel.compare import assert_faithful, differences
from tests.parallel.layouts import Cell, cells_of
from tests.parallel.models import model_of, shake
from tests.parallel.rows import STEPS, global_batch, routed, samples
from tests.parallel.whole import whole

CELLS = sorted({cell for layout in ("tp2", "ep2") for cell in cells_of(layout) if cell.subject != "base"}, key=str)


def plain_loop(cell: Cell, root: Path) -> Outcome:
    """Train without Lightning, strategy, schedule, packing, recomputation or our optimizer."""
    model, seen = model_of(Cell(cell.base, cell.subject), root), Outcome()
    model.configure_model()
    model.train()
    seen.initial = whole(model)
    shake(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"weight_decay": 0.0, "betas": (0.9, 0.999), "lr": LEARNING["lr"], "eps": LEARNING["eps"]}
    optimizer = torch.optim.AdamW(trained, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = global_batch(model, step, cell.packed)
        loss = mean_loss(model, routed(model, batch, step) if cell.routed else batch)
        loss.backward()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # an idle expert
        seen.losses.append(loss.item())
        seen.gradients = seen.gradients or whole(model, gradients=True)
        seen.norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
    seen.weights = whole(model)
    return seen


def mean_loss(model: Model, batch: Batch) -> Tensor:
    """Return the mean over the batch's answer tokens."""
    logits = torch.cat([*alone(model, batch)]) if batch.routes else logits_of(model, batch)
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def alone(model: Model, batch: Batch) -> Iterator[Tensor]:
    """Yield the logits of one row after another, each by itself with all adapters but its own switched off."""
    assert batch.routes is not None
    for row, way in enumerate(batch.routes.chosen[:, 0].tolist()):
        names = batch.routes.ways[way]
        for adapter in model.stack.adapters():
            # virtual tokens are ids: their rows are there whatever the way
            virtual = isinstance(model.adapters[adapter.birth.adapter], PTuning | PromptTuning)
            adapter.enabled = virtual or names is None or adapter.birth.adapter in names
        one = batch._each(lambda tensor, row=row: tensor[row : row + 1])
        yield logits_of(model, replace(one, routes=None))
    for adapter in model.stack.adapters():
        adapter.enabled = True


def logits_of(model: Model, batch: Batch) -> Tensor:
    """Return logits [b, s, v]; each sample of a packed row is a row of its own."""
    if batch.source is not None and batch.source_lengths is not None:
        mask = torch.arange(batch.source.shape[1]) < batch.source_lengths[:, None]
        return model(batch.source, batch.tokens, mask.long())
    starts = samples(batch.packed)
    edges = list(zip(starts, [*starts[1:], batch.tokens.shape[1]]))
    return torch.cat([model(batch.tokens[:, start:end]) for start, end in edges], dim=1)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_one_process_equals_a_plain_loop(cell: Cell, checkpoints: Path, one_process: Callable[[Cell], Outcome]) -> None:
    wanted, found = plain_loop(cell, checkpoints), one_process(cell)
    parallel.destroy()
    wanted.logits = found.logits
    assert_faithful(differences([found], wanted))


def test_logits_are_those_of_transformers(checkpoints: Path, one_process: Callable[[Cell], Outcome]) -> None:
    """The forward pass of the base has an oracle of its own."""
    from tests.helpers.tiny_hf import oracle

    ids = torch.tensor([[5, 7, 11, 13, 17, 19, 4], [2, 3, 23, 29, 31, 37, 60]])
    with torch.no_grad():
        wanted = oracle(checkpoints / "llama")(ids).logits
    found = one_process(Cell("llama", "base")).logits
    assert found is not None and (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("cell", [c for c in CELLS if c.base in ("llama", "t5", "mt5")], ids=str)
def test_everything_compared_is_alive(cell: Cell, one_process: Callable[[Cell], Outcome]) -> None:
    """No gradient is zero, every trained tensor moves from where it was shaken to, clipping is at work."""
    seen = one_process(cell)
    assert min(seen.norms) > CLIP and len(set(seen.losses)) == STEPS
    assert all(gradient.abs().max() > 1e-6 for gradient in seen.gradients.values())
    assert all(not torch.equal(weight, seen.initial[name]) for name, weight in seen.weights.items())


def test_recomputation_changes_nothing_and_packing_is_another_batch(one_process: Callable[[Cell], Outcome]) -> None:
    for subject in ("everything", "ptuning"):
        plain, replayed = (one_process(Cell("llama", subject, recompute=how)) for how in (None, "full"))
        assert_faithful(differences([replayed], plain))
    packed, padded = (one_process(Cell("llama", "everything", packed=p)) for p in (True, False))
    assert differences([packed], padded)["gradients"] > 0.01
