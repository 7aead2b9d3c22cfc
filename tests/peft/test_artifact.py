"""The adapter directory: bit-equal round trips, four files, no trace of where or how it was made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftwork import models
from graftwork.errors import ArtifactError, CheckpointError, GraftworkError, MatchError
from graftwork.models import GPT
from graftwork.peft import IA3, CanonicalAdapter, LoRA, PTuning
from tests.contracts.methods import (
    STACKS,
    adapter_parameters,
    every_family,
    every_stack,
    make,
    prompted,
    same,
    shake,
    shape,
    tokens,
)
from tests.helpers.tiny_hf import make_tiny

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "proof.json"]


def trained(family: str = "llama", stack: str = "all") -> GPT:
    model = make(family)
    model.add_adapter(STACKS[stack]())
    shake(model)
    return model


def values(model: GPT) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in adapter_parameters(model)}


@every_family
@every_stack
def test_round_trip_is_bit_equal(family: str, stack: str, tmp_path: Path) -> None:
    model = trained(family, stack)
    assert model.save_adapters(tmp_path / "adapter", step=7, recipe="seed: 1") == tmp_path / "adapter"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == FILES
    twin = make(family)
    twin.load_adapters(tmp_path / "adapter")
    assert same(values(twin), values(model))
    assert torch.equal(twin(prompted(twin, tokens())), model(prompted(model, tokens())))
    assert [repr(t) for t in twin.adapters.values()] == [repr(t) for t in model.adapters.values()]
    assert twin.prompt_layout == model.prompt_layout
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == set(values(twin))


@every_stack
def test_loading_frozen_and_freezing(stack: str, tmp_path: Path) -> None:
    model = trained(stack=stack)
    model.save_adapters(tmp_path / "adapter")
    frozen = make()
    frozen.load_adapters(tmp_path / "adapter", trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert same(values(frozen), values(model))


def test_nothing_tells_where_it_was_made(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "secret_place" / "base")
    model = models.load(directory)
    model.add_adapter([LoRA(dim=4), PTuning(virtual_tokens=2, embedding_dim=4, bottleneck_dim=4)])
    shake(model)
    model.save_adapters(tmp_path / "secret_place" / "adapter")
    for file in (tmp_path / "secret_place" / "adapter").iterdir():
        assert b"secret_place" not in file.read_bytes() and bytes(tmp_path) not in file.read_bytes()
    moved = tmp_path / "elsewhere" / "other_name"
    moved.parent.mkdir()
    shutil.move(tmp_path / "secret_place" / "adapter", moved)
    base = tmp_path / "other_base_name"
    shutil.move(directory, base)
    twin = models.load(base)
    twin.load_adapters(moved)
    assert same(values(twin), values(model))


def test_what_the_files_hold(tmp_path: Path) -> None:
    model = make(sizes={"num_layers": 1})
    model.add_adapter(STACKS["all"]())
    shake(model)
    model.save_adapters(tmp_path / "adapter", step=7, recipe="trainer: x")
    tensors = load_file(tmp_path / "adapter" / FILES[2])
    layer, words = "decoder.layers.0.", "embedding.word_embeddings"
    assert {k: list(t.shape) for k, t in tensors.items()} == {
        **{
            f"lora.{layer}{site}.{n}": size
            for site, a, b in (
                ("self_attention.linear_qkv", [4, 32], [64, 4]),
                ("self_attention.linear_proj", [4, 32], [32, 4]),
                ("mlp.linear_fc1", [4, 32], [96, 4]),
                ("mlp.linear_fc2", [4, 48], [32, 4]),
            )
            for n, size in (("lora_A", a), ("lora_B", b))
        },
        f"ia3.{layer}self_attention.linear_qkv.scale_k": [16],
        f"ia3.{layer}self_attention.linear_qkv.scale_v": [16],
        f"ia3.{layer}mlp.linear_fc2.scale_ffn": [48],
        **{
            f"canonical_adapter.{layer}{site}.{n}": size
            for site in ("self_attention", "mlp")
            for n, size in (
                ("norm_weight", [32]),
                ("norm_bias", [32]),
                ("linear_in", [6, 32]),
                ("linear_out", [32, 6]),
            )
        },
        f"ptuning.{words}.slots": [3, 12],
        f"ptuning.{words}.linear_in": [10, 12],
        f"ptuning.{words}.bias_in": [10],
        f"ptuning.{words}.linear_out": [32, 10],
        f"ptuning.{words}.bias_out": [32],
        f"ptuning.{words}.table": [3, 32],
    }
    assert all(t.dtype == torch.float32 for t in tensors.values())
    (prompt,) = model.stack.adapters("ptuning")
    assert torch.equal(tensors[f"ptuning.{words}.table"], prompt.rows())
    config = json.loads((tmp_path / "adapter" / FILES[1]).read_text())
    assert config["format"] == "graftwork" and config["peft_type"] == "GRAFTWORK" and config["schema"] == 1
    assert [a["method"] for a in config["adapters"]] == ["LoRA", "IA3", "CanonicalAdapter", "PTuning"]
    assert config["step"] == 7 and config["recipe"] == "trainer: x"
    assert config["base"]["shape"]["hidden_size"] == 32 and config["versions"]["megatron-core"]
    card = (tmp_path / "adapter" / FILES[0]).read_text()
    assert "LoRA(name='lora', dim=4" in card and "trained for 7 steps" in card


def test_some_of_the_adapters(tmp_path: Path) -> None:
    model = trained()
    model.save_adapters(tmp_path / "two", names=["ia3", "lora"])
    model.save_adapters(tmp_path / "all")
    twin = make()
    twin.load_adapters(tmp_path / "two")
    assert list(twin.adapters) == ["lora", "ia3"], "inner to outer, as they stood in the model"
    one = make()
    one.load_adapters(tmp_path / "all", names=["ptuning"])
    assert list(one.adapters) == ["ptuning"]
    assert all(torch.equal(p, values(model)[n]) for n, p in adapter_parameters(one))
    one.load_adapters(tmp_path / "all", names=["lora"], trainable=False)
    assert list(one.adapters) == ["ptuning", "lora"]
    assert {n.split(".adapters.")[1].split(".")[0] for n, p in one.named_parameters() if p.requires_grad} == {"ptuning"}
    with pytest.raises(ArtifactError, match=r"has no adapter 'lorra'; did you mean 'lora'\?"):
        one.load_adapters(tmp_path / "all", names=["lorra"])
    with pytest.raises(MatchError, match="did you mean 'ia3'"):
        model.save_adapters(tmp_path / "none", names=["ia33"])
    with pytest.raises(ArtifactError, match="No adapter was named"):
        model.save_adapters(tmp_path / "none", names=[])
    with pytest.raises(ArtifactError, match="no adapters to save"):
        make().save_adapters(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_attached_adapters_of_the_same_recipe_get_the_values(tmp_path: Path) -> None:
    model = trained(stack="lora+ia3")
    model.save_adapters(tmp_path / "adapter")
    twin = make()
    twin.add_adapter(LoRA(dim=4), trainable=False)
    twin.load_adapters(tmp_path / "adapter")
    assert list(twin.adapters) == ["lora", "ia3"] and same(values(twin), values(model))
    assert {n.split(".adapters.")[1].split(".")[0] for n, p in twin.named_parameters() if p.requires_grad} == {"ia3"}
    other = make()
    other.add_adapter(LoRA(dim=8))
    before = values(other)
    with pytest.raises(ArtifactError, match=r"another adapter named 'lora': LoRA\(name='lora'.*dim=8"):
        other.load_adapters(tmp_path / "adapter")
    assert same(values(other), before) and list(other.adapters) == ["lora"]


def test_loading_before_the_model_exists(tmp_path: Path) -> None:
    trained(stack="lora").save_adapters(tmp_path / "adapter")
    model = GPT(shape(), dtype="fp32")
    with pytest.raises(ArtifactError, match="no adapter directory"):
        model.load_adapters(tmp_path / "adaptr")
    model.load_adapters(tmp_path / "adapter")
    model.freeze()
    assert not model.adapters
    model.configure_model()
    assert list(model.adapters) == ["lora"] and not any(p.requires_grad for p in model.parameters())


def test_saving_again_replaces_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    model, place = trained(stack="lora"), tmp_path / "adapter"
    model.save_adapters(place)
    model.add_adapter(IA3())
    model.save_adapters(place)
    assert sorted(p.name for p in place.iterdir()) == FILES and sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter"
    ]
    twin = make()
    twin.load_adapters(place)
    assert list(twin.adapters) == ["lora", "ia3"]

    (place / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds 'notes.txt' and is no adapter directory"):
        model.save_adapters(place)
    with pytest.raises(ArtifactError, match="is no adapter directory"):
        model.save_adapters(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        model.save_adapters(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine" and (place / "notes.txt").read_text() == "mine"
    with pytest.raises(GraftworkError, match="cannot be written"):
        model.save_adapters(tmp_path / "file" / "adapter")


def test_saving_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    model = trained(stack="lora")
    model.save_adapters(tmp_path / "step_1")
    (tmp_path / "best").symlink_to(tmp_path / "step_1")
    shake(model)
    model.save_adapters(tmp_path / "best")
    assert (tmp_path / "best").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["best", "step_1"]
    twin = make()
    twin.load_adapters(tmp_path / "step_1")
    assert same(values(twin), values(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(bad: float, tmp_path: Path) -> None:
    model = trained(stack="canonical")
    model.save_adapters(tmp_path / "adapter")
    before = (tmp_path / "adapter" / FILES[2]).read_bytes()
    next(p for _, p in adapter_parameters(model)).data[0] = bad
    with pytest.raises(CheckpointError, match=r"not saved: tensor 'canonical_adapter\..*' holds NaN or Inf"):
        model.save_adapters(tmp_path / "adapter")
    assert (tmp_path / "adapter" / FILES[2]).read_bytes() == before


@pytest.mark.fault(
    "an adapter is loaded onto another base",
    "the artifact keeps the base's fingerprint; another one is refused",
)
def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    ours, other = make_tiny("llama", tmp_path / "ours"), make_tiny("llama", tmp_path / "other", seed=1)
    wider = make_tiny("llama", tmp_path / "wider", intermediate_size=96)
    model = models.load(ours)
    model.add_adapter([LoRA(dim=4), CanonicalAdapter(dim=4)])
    shake(model)
    model.save_adapters(tmp_path / "adapter")
    for base, message in ((other, "whose weights differ from this base .*check_base=False"), (wider, "another shape")):
        stranger = models.load(base)
        before = stranger(tokens())
        with pytest.raises(ArtifactError, match=message) as caught:
            stranger.load_adapters(tmp_path / "adapter")
        assert "\n" not in str(caught.value) and not stranger.adapters
        assert torch.equal(stranger(tokens()), before) and all(p.requires_grad for p in stranger.parameters())
    assert "ffn_hidden_size 80 (here 96)" in str(caught.value)
    stranger = models.load(other)
    stranger.load_adapters(tmp_path / "adapter", check_base=False)
    assert same(values(stranger), values(model))
    same_base = models.load(shutil.copytree(ours, tmp_path / "copy"))
    same_base.load_adapters(tmp_path / "adapter")
