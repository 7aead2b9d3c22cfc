"""Logits equal those of transformers for every family; export is the bit-exact inverse of load."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.errors import CheckpointError
from graftwork.models.shapes import Shape
from graftwork.models.weights import export_weights, load_weights, read_config, shape_from_hf
from graftwork.models.weights.files import INDEX
from tests.helpers.core import build, loaded, logits
from tests.helpers.tiny_hf import FAMILIES, ODD_VOCABULARY, make_tiny, oracle

TOLERANCE = 2e-5
"""Largest difference of logits, relative to their largest absolute value."""


def tokens(length: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(ODD_VOCABULARY, (2, length), generator=generator)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours[..., : theirs.shape[-1]] - theirs).abs().max() / theirs.abs().max())


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_tensors(first: Path, second: Path) -> None:
    one, two = stored(first), stored(second)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    directory = make_tiny(family, tmp_path / "hf")
    module, _ = loaded(directory)
    with torch.no_grad():
        theirs = oracle(directory)(tokens()).logits
    assert difference(logits(module, tokens()), theirs) < TOLERANCE
    # The comparison would notice one changed weight.
    with torch.no_grad():
        mlp = module.decoder.layers[3].mlp
        (mlp.experts.local_experts[1] if hasattr(mlp, "experts") else mlp).linear_fc2.weight[0, 0] += 0.1
    assert difference(logits(module, tokens()), theirs) > 10 * TOLERANCE


def test_rope_scaling_matters(tmp_path: Path) -> None:
    directory = make_tiny("llama3_rope", tmp_path / "hf")
    long = tokens(600)
    module, shape = loaded(directory)
    with torch.no_grad():
        theirs = oracle(directory)(long).logits
    assert difference(logits(module, long), theirs) < TOLERANCE
    plain = build(Shape(**{**vars(shape), "rope_scaling_factor": None}))
    load_weights(plain, shape, directory)
    assert difference(logits(plain, long), theirs) > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_the_inverse_of_load(family: str, dtype: str, tmp_path: Path) -> None:
    directory = make_tiny(family, tmp_path / "hf", dtype=dtype)
    module, shape = loaded(directory, getattr(torch, dtype))
    export_weights(module, shape, tmp_path / "out", source=directory)
    assert_same_tensors(directory, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert shape_from_hf(config) == shape and config["torch_dtype"] == dtype and config["eos_token_id"] == 2
    with torch.no_grad():
        assert torch.equal(oracle(directory)(tokens()).logits, oracle(tmp_path / "out")(tokens()).logits)


def test_sharded_checkpoints_load_and_are_written(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "one")
    module, shape = loaded(directory)
    export_weights(module, shape, tmp_path / "many", shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert_same_tensors(directory, tmp_path / "many")
    again, _ = loaded(tmp_path / "many")
    assert torch.equal(logits(again, tokens()), logits(module, tokens()))
    with torch.no_grad():
        assert difference(logits(module, tokens()), oracle(tmp_path / "many")(tokens()).logits) < TOLERANCE


def test_mixed_dtypes_survive(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf", vocab_size=101)
    module, shape = loaded(directory, torch.bfloat16)
    module.decoder.final_layernorm.float()
    export_weights(module, shape, tmp_path / "out")
    written = stored(tmp_path / "out")
    assert written["model.norm.weight"].dtype == torch.float32
    assert {t.dtype for name, t in written.items() if name != "model.norm.weight"} == {torch.bfloat16}


def test_original_gpt2_names_and_masks_are_accepted(tmp_path: Path) -> None:
    # The first GPT-2 files have no "transformer." prefix, and carry causal masks.
    directory = make_tiny("gpt2", tmp_path / "hf")
    module, _ = loaded(directory)
    old = {name.removeprefix("transformer."): t for name, t in stored(directory).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(old, directory / "model.safetensors", metadata={"format": "pt"})
    again, _ = loaded(directory)
    assert torch.equal(logits(again, tokens()), logits(module, tokens()))


def test_tied_checkpoint_with_a_redundant_head(tmp_path: Path) -> None:
    directory = make_tiny("llama_tied", tmp_path / "hf")
    tensors = stored(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    loaded(directory)


def test_adapters_on_the_module_are_ignored(tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    module, shape = loaded(directory)
    expected = logits(module, tokens())
    linear = module.decoder.layers[0].mlp.linear_fc2
    linear.adapters = torch.nn.ModuleDict({"lora": torch.nn.Linear(4, 4)})
    with torch.no_grad():
        linear.weight.zero_()
    load_weights(module, shape, directory)
    assert torch.equal(logits(module, tokens()), expected)
    export_weights(module, shape, tmp_path / "out")
    assert_same_tensors(directory, tmp_path / "out")


def rewrite(directory: Path, change) -> None:
    tensors = stored(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(directory: Path) -> None:
    rewrite(directory, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))


def add_tensor(directory: Path) -> None:
    rewrite(directory, lambda t: t.update({"model.layers.9.extra.weight": torch.zeros(1)}))


def reshape_tensor(directory: Path) -> None:
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.zeros(47)}))


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty_file(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def lost_shard(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (directory / INDEX).write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def broken_index(directory: Path) -> None:
    (directory / INDEX).write_text("{")
    (directory / "model.safetensors").unlink()


def lying_index(directory: Path) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.nom.weight": "one.safetensors"}}))
    (directory / "model.safetensors").rename(directory / "one.safetensors")


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop_tensor, r"1 tensor\(s\) missing: model.layers.1.self_attn.k_proj.weight"),
        (add_tensor, r"1 tensor\(s\) unexpected: model.layers.9.extra.weight"),
        (reshape_tensor, r"1 tensor\(s\) of the wrong shape: model.norm.weight is \[47\] instead of \[48\]"),
        (truncate, r"model.safetensors' is damaged or incomplete"),
        (empty_file, r"model.safetensors' is damaged or incomplete"),
        (lost_shard, "names files that are not there: model-00002-of-00002.safetensors"),
        (broken_index, r"index.json' is not valid JSON"),
        (lying_index, "places 'model.nom.weight' in one.safetensors, which does not hold it"),
        (pickled, "has neither model.safetensors nor .* pytorch_model.bin: save the model again"),
    ],
)
def test_damaged_checkpoints_are_one_sentence(damage, message: str, tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    module, shape = loaded(directory)
    before = logits(module, tokens())
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(module, shape, directory)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(module, tokens()), before)


def test_full_disk_leaves_no_export(tmp_path: Path, monkeypatch) -> None:
    directory = make_tiny("llama", tmp_path / "hf")
    module, shape = loaded(directory)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graftwork.models.weights.writer.write_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        export_weights(module, shape, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
