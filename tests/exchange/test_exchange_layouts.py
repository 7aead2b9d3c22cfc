"""Adapters out and in on several ranks are what one process writes and reads."""

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from graftwork import parallel
from graftwork.errors import GraftworkError
from graftwork.inference.verify import verify_directory
from graftwork.models.base import Model
from graftwork.models.exchange.directory import export_directory
from graftwork.models.exchange.export import Wanted
from graftwork.peft import IA3, CanonicalLoRA, DoRA, LoRA, PromptTuning
from graftwork.training import Layout
from tests.contracts.methods import prompted, shake
from tests.exchange.test_peft_in import config_of
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny_hf import make_tiny, oracle
from tests.parallel.layouts import Cell
from tests.parallel.models import model_of
from tests.peft.hf_lora import tokens

LAYOUTS = {
    "tp2": Layout(tensor_model_parallel_size=2),
    "pp2": Layout(pipeline_model_parallel_size=2),
}
KINDS = ("lora", "dora", "dora_some", "ia3", "prompt")


def bare(root: Path, layout: Layout | None = None) -> Model:
    """Return the base model, built in a layout."""
    model = model_of(Cell("llama", "full"), root)
    parallel.initialize(layout or Layout())
    model.configure_model()
    return model


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.eval()(prompted(model, tokens()))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base, adapters of Hugging Face PEFT on it, an artifact of a stack and what one process exports of it."""
    root = tmp_path_factory.mktemp("layouts")
    make_tiny("llama", root / "llama")
    for kind in KINDS:
        theirs = peft.get_peft_model(oracle(root / "llama"), config_of(kind, "llama"))
        torch.manual_seed(3)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        theirs.save_pretrained(root / kind)
    model = bare(root)
    head = LoRA(dim=4, target_modules=["output_layer", "word_embeddings", "linear_fc1"])
    prompts = PromptTuning(virtual_tokens=3, placement="before_bos", init="random")
    dora = DoRA(dim=4, target_modules=["linear_qkv", "linear_fc2", "output_layer"])
    model.add_adapter([head, dora, CanonicalLoRA(dim=4), IA3(), prompts])
    shake(model, 0.05)
    model.save_adapters(root / "artifact")
    model.export_adapters(root / "one")
    parallel.destroy()
    return root


def both_ways(rank: int, world: int, name: str, root: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Export a stack and load every kind in a layout; return logits, and what was refused."""
    layout = LAYOUTS[name]
    parallel.initialize(layout)
    model, found = bare(root, layout), {}
    model.load_adapters(root / "artifact")
    model.export_adapters(root / name)
    refused = []
    for adapter in list(model.adapters):
        model.delete_adapter(adapter)
    for path in ("damaged", "one"):
        try:
            model.load_adapters(root / path)
        except GraftworkError as error:
            refused.append(str(error))
    for kind in KINDS:
        model.load_adapters(root / kind)
        found[kind] = logits(model)
        model.delete_adapter(next(iter(model.adapters)))
    return found, refused


@pytest.mark.processes
@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_two_ranks_write_and_read_as_one(layout: str, root: Path) -> None:
    (root / "damaged").mkdir(exist_ok=True)
    (root / "damaged" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "bias": "all"}))
    wanted = {}
    for kind in KINDS:
        model = bare(root)
        model.load_adapters(root / kind)
        wanted[kind] = logits(model)
    parallel.destroy()
    for found, refused in run_ranks(both_ways, 2, layout, root, timeout=300):
        assert len(refused) == 2 and "bias='all'" in refused[0] and "holds no adapter_config.json" in refused[1]
        for kind in KINDS:
            assert (found[kind] - wanted[kind]).abs().max() <= 1e-5 * wanted[kind].abs().max(), kind
    for name in ("lora", "dora", "canonical_lora", "ia3", "prompt_tuning"):
        proved = verify_directory(root / layout / name, str(root / "llama"))
        assert proved.ok and all(row.difference <= 1e-5 for row in proved.rows) and proved.rows[1].effect > 1e-2
    parallel.destroy()
    export_directory(root / "artifact", root / "without", Wanted(base="llama"), lambda: None)
    names = sorted(str(p.relative_to(root / "one")) for p in (root / "one").rglob("*") if p.is_file())
    assert len(names) == 4 * 5
    for name in names:
        if name.endswith(("proof.json", "README.md")):
            continue  # they tell the layout
        for other in (layout, "without"):
            assert (root / other / name).read_bytes() == (root / "one" / name).read_bytes(), (other, name)
