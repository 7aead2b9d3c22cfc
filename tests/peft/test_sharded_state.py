"""Adapters through megatron-core's own checkpoints: the sharded state of one layout loads in another."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from graftwork import parallel
from graftwork.models import GPT
from graftwork.peft import IA3, CanonicalAdapter, LoRA
from tests.contracts.methods import STACKS, adapter_parameters, make, shake, shape
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of


def adapted() -> GPT:
    """Every kind of cut, in some layers only, so that layers are not one homogeneous tensor."""
    model = GPT(shape(), dtype="fp32")
    model.add_adapter(STACKS["all"]())
    model.add_adapter(
        [LoRA("one", dim=4, layers=[1]), IA3("two", layers=[0]), CanonicalAdapter("three", dim=4, layers=[1])]
    )
    model.add_adapter(LoRA("head", dim=4, target_modules=["output_layer", "word_embeddings"]))
    model.configure_model()
    return model


def adapter_state(model: GPT) -> dict:
    return {k: v for k, v in model.chunks[0].sharded_state_dict().items() if ".adapters." in k}


def save(rank: int, world: int, sizes: dict[str, int], source: Path, target: Path) -> None:
    """Load an artifact in this layout and save the sharded state of its adapters."""
    parallel.initialize(layout_of(**sizes))
    model = adapted()
    model.load_adapters(source, check_base=False)
    dist_checkpointing.save(adapter_state(model), str(target))


@pytest.mark.processes
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"pipeline": 2}, {}])
def test_saved_in_a_layout_loaded_by_one_process(sizes: dict[str, int], tmp_path: Path) -> None:
    parallel.ensure_initialized()
    model = adapted()
    shake(model)
    model.save_adapters(tmp_path / "adapter")
    (tmp_path / "state").mkdir()
    run_ranks(save, 2, sizes, tmp_path / "adapter", tmp_path / "state")
    twin = adapted()
    loaded = dist_checkpointing.load(adapter_state(twin), str(tmp_path / "state"))
    twin.chunks[0].load_state_dict(loaded, strict=False)
    wanted: dict[str, Tensor] = dict(adapter_parameters(model))
    found = dict(adapter_parameters(twin))
    assert list(found) == list(wanted) and len(loaded) == len(found)
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name]), name
    parallel.destroy()


def test_keys_tell_layers_apart() -> None:
    model = make()
    model.add_adapter(LoRA(dim=4, target_modules=["linear_fc1"]))
    keys = {k: v.key for k, v in adapter_state(model).items()}
    assert keys["decoder.layers.1.mlp.linear_fc1.adapters.lora.lora_A"].endswith("adapters.lora.lora_A.1")
    assert len(set(keys.values())) == len(keys)
