"""Adapters of experts that are spread over ranks go out, come in and merge as those of one process do."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftwork import parallel
from graftwork.models.base import Model
from graftwork.models.merging import merge_directory
from graftwork.peft import IA3, CanonicalLoRA, LoRA
from graftwork.training import Layout
from tests.contracts.methods import shake
from tests.exchange.test_exchange_layouts import logits
from tests.exchange.test_merged_directory import identical, tensors
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny_hf import make_tiny
from tests.parallel.layouts import Cell
from tests.parallel.models import model_of

BASE = "qwen2_moe_every_other"
LAYOUTS = {
    "ep2": Layout(expert_model_parallel_size=2),
    "tp2_sp_ep2": Layout(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
}
ADAPTERS = ("each", "one_for_all", "attention")


def bare(root: Path, layout: Layout | None = None) -> Model:
    """Return the base model, built in a layout."""
    model = model_of(Cell(BASE, "full"), root)
    parallel.initialize(layout or Layout())
    model.configure_model()
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base, an artifact of a stack on it, and what one process exports of it."""
    root = tmp_path_factory.mktemp("experts")
    make_tiny(BASE, root / BASE)
    model = bare(root)
    stack = [LoRA("each", dim=4), CanonicalLoRA("one_for_all", dim=3, share_experts=True)]
    model.add_adapter([*stack, IA3("attention", targets=["k", "v"])])
    shake(model, 0.05)
    model.save_adapters(root / "artifact")
    model.export_adapters(root / "one")
    parallel.destroy()
    return root


def both_ways(rank: int, world: int, name: str, root: Path) -> dict[str, Tensor]:
    """Export the stack in a layout, save it there anew, and load what one process has exported; return logits."""
    layout = LAYOUTS[name]
    parallel.initialize(layout)
    model, found = bare(root, layout), {}
    model.load_adapters(root / "artifact")
    model.export_adapters(root / name)
    model.save_adapters(root / f"{name}_saved")
    for adapter in ADAPTERS:
        model.delete_adapter(adapter)
    for adapter in ADAPTERS:
        model.load_adapters(root / "one" / adapter)
        found[adapter] = logits(model)
        model.delete_adapter(next(iter(model.adapters)))
    return found


@pytest.mark.processes
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_that_share_experts_write_and_read_as_one(name: str, root: Path, tmp_path: Path) -> None:
    wanted = {}
    for adapter in ADAPTERS:
        model = bare(root)
        model.load_adapters(root / "one" / adapter)
        wanted[adapter] = logits(model)
    parallel.destroy()
    for found in run_ranks(both_ways, 2, name, root, timeout=300):
        for adapter in ADAPTERS:
            assert (found[adapter] - wanted[adapter]).abs().max() <= 1e-5 * wanted[adapter].abs().max(), adapter
    for path in (root / "one").rglob("adapter_*"):
        assert (root / name / path.relative_to(root / "one")).read_bytes() == path.read_bytes(), path
    one = tensors(merge_directory(root / "artifact", tmp_path / "one", root / BASE))
    assert identical(one, tensors(merge_directory(root / f"{name}_saved", tmp_path / "again", root / BASE)))
    assert not any(torch.equal(one[key], tensor) for key, tensor in tensors(root / BASE).items() if "experts" in key)
