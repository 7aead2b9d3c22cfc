"""An artifact of any layout is merged from its directory as one process, and the layout itself, merge it."""

from pathlib import Path

import pytest
import torch

from graftwork import parallel
from graftwork.models.merging import merge_directory
from graftwork.peft import IA3, CanonicalLoRA, DoRA, LoRA, Selective
from tests.contracts.methods import shake
from tests.exchange.test_exchange_layouts import LAYOUTS, bare
from tests.exchange.test_merged_directory import identical, tensors
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny_hf import make_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base of an odd vocabulary, and an artifact of all that merges, on its head too."""
    root = tmp_path_factory.mktemp("layouts")
    make_tiny("llama", root / "llama")
    model = bare(root)
    head = LoRA(dim=4, target_modules=["output_layer", "linear_fc1"])
    dora = DoRA(dim=4, target_modules=["linear_qkv", "linear_fc2", "output_layer"])
    model.add_adapter([head, dora, CanonicalLoRA(dim=4), IA3(), Selective(patterns=["norm", "word_embeddings"])])
    shake(model, 0.05)
    model.save_adapters(root / "artifact")
    parallel.destroy()
    return root


def merged(rank: int, world: int, name: str, root: Path) -> None:
    """Load the artifact in a layout, save it again there, and export the merged model."""
    parallel.initialize(LAYOUTS[name])
    model = bare(root, LAYOUTS[name])
    model.load_adapters(root / "artifact")
    model.save_adapters(root / f"{name}_saved")
    model.merge_adapters()
    model.export_hf(root / f"{name}_exported")


@pytest.mark.processes
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_merges_to_the_same(name: str, root: Path, tmp_path: Path) -> None:
    run_ranks(merged, 2, name, root)
    one = tensors(merge_directory(root / "artifact", tmp_path / "one", root / "llama"))
    again = tensors(merge_directory(root / f"{name}_saved", tmp_path / "again", root / "llama"))
    assert identical(one, again)
    exported, base = tensors(root / f"{name}_exported"), tensors(root / "llama")
    assert exported.keys() == one.keys()
    for key, tensor in one.items():
        assert not torch.equal(tensor, base[key])
        assert (tensor - exported[key]).abs().max() <= 1e-6 * tensor.abs().max(), key  # cut products round otherwise
