"""A checkpoint that is read layer by layer while it runs: the logits of a loaded model, the memory of a layer."""

from pathlib import Path

import pytest
import torch

from graftwork import models, parallel
from graftwork.models.streamed import streamed
from tests.helpers import tiny_t5
from tests.helpers.tiny_hf import make_tiny

FAMILIES = ("llama", "llama_tied", "gpt2", "phi3", "nemotron", "mixtral", "t5", "t5v11")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_is_that_of_a_loaded_model(family: str, tmp_path: Path) -> None:
    t5 = family in tiny_t5.KINDS
    (tiny_t5.make_t5 if t5 else make_tiny)(family, tmp_path / "base")
    ids = torch.arange(1, 21)[None]
    given = (ids, ids[:, :7]) if t5 else (ids,)
    with torch.no_grad():
        wanted = models.load(tmp_path / "base").eval()(*given)
        parallel.destroy()
        before = torch.get_rng_state()
        with streamed(tmp_path / "base") as model:
            found, again = model(*given), model(*given)
            held = sum(p.untyped_storage().nbytes() for p in model.parameters())
            whole = sum(4 * p.numel() for p in model.parameters())
    assert torch.equal(found, wanted) and torch.equal(again, wanted)
    assert held < 0.1 * whole and not parallel.is_initialized()
    assert torch.equal(torch.get_rng_state(), before)


def test_one_layer_is_there_at_a_time(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "base")
    most = 0
    with streamed(tmp_path / "base") as model, torch.no_grad():

        def look(*_: object) -> None:
            nonlocal most
            most = max(most, sum(p.untyped_storage().nbytes() for n, p in model.named_parameters() if ".layers." in n))

        for layer in model.chunks[0].decoder.layers:
            layer.mlp.register_forward_hook(look)
        model(torch.arange(1, 9)[None])
        one = sum(4 * p.numel() for p in model.chunks[0].decoder.layers[0].parameters())
        small = 4 * sum(1 for n, _ in model.named_parameters() if ".layers." in n)
    assert one <= most <= one + small


def test_what_adapters_train_stays(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "base")
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    with streamed(tmp_path / "base", keep=[name]) as model, torch.no_grad():
        before = model.chunks[0].get_parameter(name)
        model(torch.arange(1, 9)[None])
        assert model.chunks[0].get_parameter(name) is before and before.stride(-1) == 1
