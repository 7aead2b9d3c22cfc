"""An artifact and training states that an earlier version wrote: they load, and the run goes on as it did there."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch import Tensor

from graftwork.layout import Layout
from graftwork.optim import AdamW
from graftwork.peft import IA3, PEFT, CanonicalAdapter, LoRA, PTuning
from graftwork.training.callbacks import Report
from graftwork.training.optimizer import Update
from graftwork.training.run_directory import latest, states
from graftwork.training.state import checkpoint
from tests.contracts.methods import make
from tests.helpers import tiny_run
from tests.helpers.tiny_run import finetune

BEFORE = Path(__file__).parents[1] / "written_before"
STEPS = 3


@dataclass(frozen=True)
class Kind:
    """How far losses and weights of the rest of the run may lie apart, relatively: other processors round otherwise."""

    losses: float
    weights: float
    dtype: str | None = None

    def stack(self) -> list[PEFT]:
        """Return the adapters; none in full fine-tuning."""
        prompt = PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8)
        return [] if self.dtype else [LoRA(dim=4, dropout=0.1), IA3(), CanonicalAdapter(dim=4), prompt]


KINDS = {"adapters": Kind(1e-5, 5e-5), "full": Kind(1e-3, 2**-6, dtype="bf16")}
"""On the processor that wrote them the difference is 0. bf16 weights keep eight bits."""


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def test_an_artifact_gives_the_logits_it_gave() -> None:
    model, known = make("llama_tied"), load_file(BEFORE / "artifact_logits.safetensors")
    model.load_adapters(BEFORE / "artifact")
    with torch.no_grad():
        assert apart(model(known["ids"]), known["logits"]) <= 3e-5  # processors round differently: 1.2e-5 was seen
    assert [type(t).__name__ for t in model.adapters.values()] == ["LoRA", "IA3", "CanonicalAdapter", "PTuning"]
    model.delete_adapter("ia3")
    with torch.no_grad():
        assert apart(model(known["ids"]), known["logits"]) > 1e-3, "the smallest of them would be missed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_state_is_read_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Weights, moments and masters go through model and optimizer into a new state; a random model forgets its own."""
    path = latest(BEFORE / kind)
    assert path is not None
    model = tiny_run.model(dtype=KINDS[kind].dtype, seed=99)
    if stack := KINDS[kind].stack():
        model.add_adapter(stack)
    model.configure_model()
    optimizer, _ = AdamW(schedule="constant").build(model, STEPS)
    update = Update(model.chunks, [optimizer])
    common, state = checkpoint.read_common(path)
    checkpoint.read_weights(path, state, update)
    checkpoint.read_optimizer(path, state, update)
    assert update.steps_made() == common["global_step"] == STEPS
    checkpoint.save(tmp_path / "again", common, update, Layout())
    wanted, found = (dist_checkpointing.load_plain_tensors(str(p / "tensors")) for p in (path, tmp_path / "again"))
    assert wanted.keys() == found.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_as_it_did(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(BEFORE / kind / "checkpoints", tmp_path / "checkpoints")
    assert [path.name for path in states(tmp_path)] == [f"step-{STEPS:08}"]
    model, trainer = tiny_run.model(dtype=KINDS[kind].dtype), tiny_run.trainer(tmp_path, enable_progress_bar=False)
    finetune(model, trainer, tiny_run.data_module(tiny_data), KINDS[kind].stack(), tiny_run.optim())
    report: Any = next(c for c in trainer.callbacks if isinstance(c, Report))
    for name, curve in json.loads((BEFORE / kind / "losses.json").read_text()).items():
        assert [step for step, _ in getattr(report, name)] == [step for step, _ in curve]
        wanted = [loss for _, loss in curve]
        assert [loss for _, loss in getattr(report, name)] == pytest.approx(wanted, rel=KINDS[kind].losses)
    weights = load_file(BEFORE / kind / "weights.safetensors")
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == weights.keys()
    assert max(apart(trained[name], weight) for name, weight in weights.items()) <= KINDS[kind].weights
