"""Adapters of mixtures of experts, out to Hugging Face PEFT and in: as parameters of transformers 5 and as modules."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftwork.errors import ArtifactError, ConfigError
from graftwork.models.exchange import places, stacks
from graftwork.models.exchange.lazy import Lazy
from graftwork.peft import IA3, PEFT, CanonicalLoRA, DoRA, LoRA
from tests.exchange.desk import Desk, equal, factors

FAMILIES = (
    "mixtral",
    "qwen2_moe_every_other",
    pytest.param("qwen3_moe_some", marks=pytest.mark.slow),
    pytest.param("qwen2_moe", marks=pytest.mark.slow),
)
METHODS: dict[str, PEFT] = {
    "lora": LoRA(dim=4, alpha=8),
    "lora_of_down": LoRA(dim=3, use_rslora=True, target_modules=["linear_fc2"]),
    "lora_shared": LoRA(dim=4, alpha=8, share_experts=True),
    "lora_of_attention": LoRA(dim=4, target_modules=["linear_qkv"]),
    "canonical": CanonicalLoRA(dim=4, alpha=3),
    "canonical_shared": CanonicalLoRA(dim=3, share_experts=True),
    "canonical_of_gates": CanonicalLoRA(dim=4, target_modules=["linear_fc1_gate", "linear_q"]),
    "one_expert": LoRA(dim=4, target_modules=["experts.local_experts.1.linear_fc1"], layers=[1, 3]),
    "ranks": LoRA(
        dim=4,
        rank_pattern={"local_experts.1.linear_fc1": 2, "local_experts.0.linear_fc2": 6},
        alpha_pattern={"local_experts.2.linear_fc1": 5, "linear_proj": 3},
    ),
}
OTHERWISE = ("ranks",)
"""What comes back with the same function but other tensors: of one rank, zeros behind their own."""


@pytest.fixture(scope="module", params=FAMILIES)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.mark.parametrize("method", METHODS)
def test_parameters_have_our_logits_and_come_back_bit_for_bit(method: str, desk: Desk, tmp_path: Path) -> None:
    model = desk.grafted(METHODS[method])
    wanted, went = desk.logits(model), factors(model)
    model.export_adapters(tmp_path / "out")
    assert desk.changes(wanted)
    assert desk.same(desk.logits(desk.theirs(tmp_path / "out")), wanted)
    back = desk.clear()
    back.load_adapters(tmp_path / "out")
    (transform,) = back.adapters.values()
    if method in OTHERWISE:
        assert desk.same(desk.logits(back.eval()), wanted)
        return
    assert torch.equal(desk.logits(back.eval()), wanted) and equal(factors(back), went)
    assert isinstance(transform, LoRA) and transform.share_experts == METHODS[method].share_experts  # type: ignore[attr-defined]


def plus_dense(desk: Desk, directory: Path) -> nn.Module:
    """Return transformers' model with ``scale B A`` of every module in a directory added to its weights."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    model = desk.oracle()
    with torch.no_grad():
        for key in sorted(k for k in tensors if k.endswith(".lora_A.weight")):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            change = scale * tensors.pop(key.replace("lora_A", "lora_B")) @ tensors.pop(key)
            weight_of(model, module).add_(change)
    assert not tensors, "tensors of no module"
    return model


def weight_of(model: nn.Module, module: str) -> Tensor:
    """Return the weight of a published module; of an expert it is a part of what transformers 5 holds."""
    layer, found, expert = module.partition(".experts.")
    if not found:
        return model.get_submodule(module).weight
    number, leaf = expert.split(".")
    held = model.get_submodule(layer.replace("block_sparse_moe", "mlp") + ".experts")
    if leaf in ("down_proj", "w2"):
        return held.down_proj[int(number)]
    half = held.gate_up_proj.shape[1] // 2
    return held.gate_up_proj[int(number), half:] if leaf in ("up_proj", "w3") else held.gate_up_proj[int(number), :half]


@pytest.mark.parametrize("for_", ["peft", "vllm"])
@pytest.mark.parametrize("method", ["lora", "lora_shared", "canonical", "one_expert"])
def test_modules_are_named_as_published(method: str, for_: str, desk: Desk, tmp_path: Path) -> None:
    model = desk.grafted(METHODS[method])
    wanted, went = desk.logits(model), factors(model)
    model.export_adapters(tmp_path / "out", for_=for_, experts="modules" if for_ == "peft" else None)
    assert desk.same(desk.logits(plus_dense(desk, tmp_path / "out")), wanted)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "target_parameters" not in config
    if for_ == "peft":
        back = desk.clear()
        back.load_adapters(tmp_path / "out")
        assert torch.equal(desk.logits(back.eval()), wanted) and equal(factors(back), went)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_peft_itself_reads_modules_of_whole_mixtures(family: str, tmp_path: Path) -> None:
    desk = Desk(family, tmp_path / "hf")
    model = desk.grafted(LoRA(dim=4, alpha=8))
    wanted = desk.logits(model)
    model.export_adapters(tmp_path / "out", experts="modules")
    assert desk.same(desk.logits(desk.theirs(tmp_path / "out")), wanted)


def test_what_counts_for_mixtures_alone(mixtral: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Desk("llama", tmp_path / "llama").grafted(LoRA(dim=2))
    with pytest.raises(ConfigError, match="experts='modules' counts only for a mixture of experts; leave it out"):
        dense.export_adapters(tmp_path / "out", experts="modules")
    monkeypatch.setattr(places, "MOST_EXPERTS", 15)
    with pytest.raises(ConfigError, match="a model of 4 times 4 experts has no adapters to exchange"):
        mixtral.grafted(LoRA(dim=2)).export_adapters(tmp_path / "out")


@pytest.mark.fault(
    "a LoRA of experts goes out with experts, ranks, gate and up, or scales in each other's place",
    "the exported adapter is loaded by PEFT and its logits are compared",
)
@pytest.mark.parametrize("mistake", ["experts by rank", "up before gate", "both in one place", "one rank for both"])
def test_the_comparison_notices_a_mistake(
    mistake: str, mixtral: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixtral.grafted(CanonicalLoRA(dim=4, alpha=8))
    wanted = mixtral.logits(model)
    together, joined = stacks._together, stacks._whole
    if mistake == "experts by rank":  # B as [outputs, experts, rank] instead of [outputs, rank, experts]

        def turned(*given: Any) -> Any:
            pair = together(*given)
            high = pair.B[:].unflatten(1, (pair.rank, -1)).transpose(1, 2).flatten(1)
            return replace(pair, B=Lazy(pair.B.shape, lambda: high))

        monkeypatch.setattr(stacks, "_together", turned)
    if mistake == "up before gate":

        def swapped(linear: Any, group: Any, rslora: bool) -> Any:
            return joined(linear, {1 - i: p for i, p in reversed(group.items())} if len(group) > 1 else group, rslora)

        monkeypatch.setattr(stacks, "_whole", swapped)
    model.export_adapters(tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(path)
    if mistake == "both in one place":
        tensors = {k.replace(".base_layer.", "."): t for k, t in tensors.items()}
    if mistake == "one rank for both":
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["alpha_pattern"] == {"gate_up_proj": 16}
        (tmp_path / "out" / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {}}))
    save_file(tensors, path)
    assert not mixtral.same(mixtral.logits(mixtral.theirs(tmp_path / "out")), wanted)


THEIRS: dict[str, dict[str, Any]] = {
    "parameters": {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["gate_up_proj", "experts.down_proj"]},
    "one parameter": {"target_modules": [], "target_parameters": ["1.mlp.experts.gate_up_proj"]},
    "patterns": {
        "target_modules": ["v_proj"],
        "target_parameters": ["mlp.experts.down_proj", "gate_up_proj"],
        "rank_pattern": {"down_proj": 2, "1.mlp.experts.gate_up_proj": 6, "v_proj": 5},
        "alpha_pattern": {"experts.gate_up_proj": 3},
        "use_rslora": True,
    },
    "published names": {"target_modules": ["w1", "w2", "w3", "q_proj"]},
    "a linear's weight": {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight", "lm_head.weight"]},
}


@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_makes_arrives(kind: str, mixtral: Desk, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **THEIRS[kind])
    theirs = mixtral.made(config, tmp_path / "theirs")
    wanted = mixtral.logits(theirs)
    assert mixtral.changes(wanted)
    model = mixtral.clear()
    model.load_adapters(tmp_path / "theirs")
    assert mixtral.same(mixtral.logits(model.eval()), wanted)
    model.export_adapters(tmp_path / "back")
    assert mixtral.same(mixtral.logits(mixtral.theirs(tmp_path / "back")), wanted)


def test_ia3_goes_out_as_modules_alone(mixtral: Desk, tmp_path: Path) -> None:
    model = mixtral.grafted(IA3())
    wanted, went = mixtral.logits(model), factors(model)
    with pytest.raises(ConfigError, match=r"has no IA3 of a parameter.*train it with targets=\['k', 'v'\], choose exp"):
        model.export_adapters(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.export_adapters(tmp_path / "out", experts="modules")
    scales = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.w2.ia3_l"
    names = {name.format(layer, expert) for layer in range(4) for expert in range(4)}
    assert {key for key in scales if ".experts." in key} == names
    theirs = mixtral.oracle()
    with torch.no_grad():
        for key, scale in scales.items():
            weight_of(theirs, key.removeprefix("base_model.model.").removesuffix(".ia3_l")).mul_(scale)
    assert mixtral.same(mixtral.logits(theirs), wanted)
    back = mixtral.clear()
    back.load_adapters(tmp_path / "out")
    assert torch.equal(mixtral.logits(back.eval()), wanted) and equal(factors(back), went)
    mixtral.grafted(IA3(targets=["k", "v"])).export_adapters(tmp_path / "attention")


def test_what_peft_cannot_do_to_a_parameter(mixtral: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="stands at model.layers.0.mlp.experts.gate_up_proj, and Hugging Face"):
        mixtral.grafted(DoRA(dim=2)).export_adapters(tmp_path / "dora")
    model = mixtral.grafted(LoRA(dim=2, dropout=0.1))
    model.export_adapters(tmp_path / "dropped")
    assert "goes out with lora_dropout=0.0" in caplog.text
    assert mixtral.same(mixtral.logits(mixtral.theirs(tmp_path / "dropped")), mixtral.logits(model))
    with pytest.raises(ConfigError, match="experts='parameters' cannot be served by vLLM"):
        model.export_adapters(tmp_path / "served", for_="vllm", experts="parameters")
    with pytest.raises(ConfigError, match="experts is 'module'; did you mean 'modules'"):
        model.export_adapters(tmp_path / "served", experts="module")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk("mixtral", tmp_path_factory.mktemp("mixtral") / "hf")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "the router": ({"target_parameters": ["gate_up_proj", "gate.weight"]}, "gate.weight is no linear that has a LoRA"),
    "a norm": ({"target_parameters": ["input_layernorm.weight"]}, "input_layernorm.weight is no linear"),
    "an embedding": ({"target_parameters": ["embed_tokens.weight"]}, "embed_tokens.weight is no linear"),
    "nothing": ({"target_parameters": ["experts.gate"]}, "this mixtral has no such parameter"),
    "an expression": ({"target_parameters": ".*gate_up_proj"}, "target_parameters='.*a list of module names is needed"),
    "a dropout": ({"lora_dropout": 0.1}, "lora_dropout=0.1, which cannot be honoured; with target_parameters"),
    "dora": ({"use_dora": True}, "use_dora=True, which cannot be honoured; with target_parameters Hugging Face PEFT"),
    "another rank": ({"r": 8}, r"has shape \[16, 48\], but the model needs \[32, 48\]"),
    "one left out": ({"target_parameters": ["gate_up_proj"]}, "but the model needs|tensors too many"),
}


@pytest.mark.parametrize("what", WRONG)
def test_fields_of_parameters_that_cannot_be_honoured(what: str, mixtral: Desk, tmp_path: Path) -> None:
    changes, message = WRONG[what]
    mixtral.grafted(LoRA(dim=4, target_modules=["linear_fc1", "linear_fc2"])).export_adapters(tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert sorted(config["target_parameters"]) == ["down_proj", "gate_up_proj"] and config["target_modules"] == []
    path.write_text(json.dumps({**config, **changes}))
    model = mixtral.clear()
    with pytest.raises(ArtifactError, match=message) as caught:
        model.load_adapters(tmp_path / "out")
    assert "\n" not in str(caught.value) and not model.adapters
