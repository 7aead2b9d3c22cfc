"""Adapters of mixtures of experts, folded into a base on the disk: every bit is what a merged model exports."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from graftwork.models.merging import Blend, combine_directories, merge_combined, merge_directory
from graftwork.peft import IA3, PEFT, CanonicalLoRA, DoRA, LoRA, Selective
from tests.contracts.methods import shake
from tests.exchange.desk import Desk, factors
from tests.exchange.test_expert_adapters import FAMILIES
from tests.exchange.test_merged_directory import identical, oracle, tensors

METHODS: dict[str, list[PEFT]] = {
    "lora": [LoRA(dim=4, alpha=8)],
    "lora_shared": [LoRA(dim=4, share_experts=True, rank_pattern={"experts.linear_fc1": 2})],
    "canonical_shared": [CanonicalLoRA(dim=3, share_experts=True, alpha_pattern={"linear_fc1_up": 7})],
    "one_expert": [LoRA(dim=4, target_modules=["experts.local_experts.1.linear_fc1"], layers=[1, 3])],
    "ia3": [IA3(key_position="pre_norm")],
    "stack": [
        LoRA(dim=2, share_experts=True),
        IA3(key_position="pre_norm"),
        DoRA(dim=2),
        CanonicalLoRA(dim=2),
        Selective(patterns=["router", "linear_proj.weight"]),
    ],
}


@pytest.fixture(scope="module", params=FAMILIES)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.mark.parametrize("method", METHODS)
def test_every_bit_is_what_a_merged_model_exports(method: str, desk: Desk, tmp_path: Path) -> None:
    model = desk.grafted(*METHODS[method])
    assert desk.changes(desk.logits(model))
    model.save_adapters(tmp_path / "adapter")
    merge_directory(tmp_path / "adapter", tmp_path / "merged", desk.directory)
    model.merge_adapters()
    model.export_hf(tmp_path / "exported")
    folded = desk.logits(model)
    model.unmerge_adapters()
    assert identical(tensors(tmp_path / "merged"), tensors(tmp_path / "exported"))
    assert desk.same(desk.logits(oracle(desk, tmp_path / "merged")), folded)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk("mixtral", tmp_path_factory.mktemp("mixtral") / "hf")


def test_an_adapter_of_parameters_becomes_what_peft_merges(mixtral: Desk, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["v_proj"], target_parameters=["gate_up_proj", "down_proj"]
    )
    theirs = mixtral.made(config, tmp_path / "theirs")
    merge_directory(tmp_path / "theirs", tmp_path / "merged", mixtral.directory)
    found, wanted = oracle(mixtral, tmp_path / "merged").state_dict(), theirs.merge_and_unload().state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


@pytest.mark.parametrize("shared", [True, False], ids=["one_for_all", "one_each"])
@pytest.mark.parametrize("combine", ["cat", "svd", "linear"])
def test_combined(combine: str, shared: bool, mixtral: Desk, tmp_path: Path) -> None:
    directories = []
    for name in "ab":
        model = mixtral.grafted(LoRA(name, dim=2, share_experts=shared))
        shake(model, 0.02 if name == "a" else 0.05)
        directories.append(model.save_adapters(tmp_path / name))
    blend = Blend(weights=[0.7, -0.3], combine=combine, name="both", rank=4 if combine == "svd" else None)
    combine_directories(directories, tmp_path / "both", blend)
    merge_combined(directories, tmp_path / "merged", blend, base=mixtral.directory)
    model = mixtral.clear()
    model.load_adapters(tmp_path / "both")
    (transform,) = model.adapters.values()
    assert isinstance(transform, LoRA) and transform.share_experts == shared
    held = len(load_file(directories[0] / "adapter_model.safetensors"))
    assert len(factors(model)) == held
    wanted = mixtral.logits(model.eval())
    assert mixtral.changes(wanted)
    found = mixtral.logits(oracle(mixtral, tmp_path / "merged"))
    assert (found - wanted).abs().max() <= 10 * mixtral.close * wanted.abs().max()
    if combine == "linear":
        return
    # the sum of both updates, which here act one beside the other
    changes = [tensors(directory) for directory in _alone(directories, mixtral)]
    base, both = tensors(mixtral.directory), tensors(tmp_path / "merged")
    for key, tensor in base.items():
        sum_of = tensor + 0.7 * (changes[0][key] - tensor) - 0.3 * (changes[1][key] - tensor)
        assert torch.allclose(both[key], sum_of, atol=2e-6), key


def _alone(directories: list[Path], desk: Desk) -> list[Path]:
    return [merge_directory(path, path.parent / f"{path.name}_alone", desk.directory) for path in directories]
