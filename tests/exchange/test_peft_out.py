"""Adapters out: Hugging Face PEFT gives our logits, for every method and family, and what comes back is what went."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graftwork import models
from graftwork.errors import ArtifactError
from graftwork.models.weights.ops import QKV, Gated
from graftwork.peft import IA3, PEFT, CanonicalLoRA, DoRA, LoRA, PromptTuning, PTuning
from tests.contracts.methods import shake
from tests.exchange.desk import EVERY, Desk, equal, factors
from tests.peft.hf_lora import tokens

LATE = [1]
METHODS: dict[str, PEFT] = {
    "lora": LoRA(dim=4, alpha=8, dropout=0.1),
    "lora_by_pattern": LoRA(
        dim=4, use_rslora=True, layers=LATE, rank_pattern={"mlp.linear_fc2": 2}, alpha_pattern={"linear_proj": 5}
    ),
    "lora_of_the_head": LoRA(dim=4, target_modules=["output_layer", "linear_proj"]),
    "canonical": CanonicalLoRA(dim=4, rank_pattern={"linear_q": 2}, alpha_pattern={"linear_v": 7}),
    "canonical_qv": CanonicalLoRA(dim=4, target_modules=["linear_q", "linear_v"]),
    "dora": DoRA(dim=4, use_rslora=True),
    "ia3": IA3(key_position="pre_norm"),
    "ia3_of_a_layer": IA3(targets=["v", "ffn"], layers=LATE),
    "prompts": PromptTuning(virtual_tokens=3, placement="before_bos", init="random"),
    "ptuning": PTuning(virtual_tokens=3, placement="before_bos", embedding_dim=6, bottleneck_dim=6),
}
OTHERWISE = {
    (family, method) for family in ("gpt2", "phi3") for method in ("canonical", "canonical_qv", "ia3_of_a_layer")
}
"""What comes back with the same function but other tensors: one pair for three, vectors of ones."""


@pytest.fixture(scope="module", params=EVERY)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.mark.parametrize("method", METHODS)
def test_their_logits_are_ours_and_what_comes_back_is_what_went(method: str, desk: Desk, tmp_path: Path) -> None:
    model = desk.grafted(METHODS[method])
    wanted, went = desk.logits(model), factors(model)
    model.export_adapters(tmp_path / "out")
    assert desk.changes(wanted)
    assert desk.same(desk.logits(desk.theirs(tmp_path / "out")), wanted)
    back = desk.clear()
    back.load_adapters(tmp_path / "out")
    again = desk.logits(back.eval())
    if (desk.family, method) in OTHERWISE:
        assert desk.same(again, wanted)
    else:
        assert torch.equal(again, wanted)
        assert method == "ptuning" or equal(factors(back), went)
    (name,) = back.adapters
    assert (method == "ptuning") == (name == "prompt_tuning" and method != "prompts")


@pytest.mark.parametrize("method", [LoRA(dim=4, target_modules=["word_embeddings"]), LoRA(dim=2)], ids=str)
def test_embeddings_of_a_decoder_only_model(method: PEFT, tmp_path: Path) -> None:
    desk = Desk("llama_tied", tmp_path / "hf")
    model = desk.grafted(method)
    wanted = desk.logits(model)
    model.export_adapters(tmp_path / "out")
    assert desk.same(desk.logits(desk.theirs(tmp_path / "out")), wanted)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk("llama", tmp_path_factory.mktemp("llama") / "hf")


def test_targets_are_named_as_short_as_can_be(llama: Desk, tmp_path: Path) -> None:
    llama.grafted(LoRA("a", dim=4), LoRA("b", dim=4, layers=[1], target_modules=["linear_fc2"])).export_adapters(
        tmp_path / "out"
    )
    configs = {name: json.loads((tmp_path / "out" / name / "adapter_config.json").read_text()) for name in "ab"}
    whole = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(configs["a"]["target_modules"]) == sorted(whole)
    assert configs["b"]["target_modules"] == ["1.mlp.down_proj"]
    assert configs["a"]["rank_pattern"] == configs["a"]["alpha_pattern"] == {}


def test_a_stack_goes_out_one_directory_each_and_so_do_tasks(llama: Desk, tmp_path: Path) -> None:
    tasks = PromptTuning("prompts", placement="before_bos", init="random", tasks={"mood": 2, "topic": 3})
    model = llama.grafted(LoRA(dim=4), tasks)
    model.export_adapters(tmp_path / "out")
    written = sorted(str(p.parent.relative_to(tmp_path / "out")) for p in tmp_path.rglob("adapter_config.json"))
    assert written == ["lora", "prompts/mood", "prompts/topic"]
    model.export_adapters(tmp_path / "out", names=["lora"])  # an export takes the place of an export
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "proof.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2 * 7 * 4


@pytest.mark.fault(
    "a LoRA goes out with key and value rows, or gate and up, in each other's place",
    "the exported adapter is loaded by PEFT and its logits are compared",
)
@pytest.mark.parametrize("mistake", ["keys as values", "gate as up", "scale left out", "one rank for all"])
def test_the_comparison_notices_a_mistake(
    mistake: str, llama: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama.grafted(LoRA(dim=4, alpha=8, rank_pattern={"linear_proj": 2}))
    wanted = llama.logits(model)
    write = {QKV: QKV.write, Gated: Gated.write}
    if mistake == "keys as values":
        monkeypatch.setattr(QKV, "write", lambda op, full: [write[QKV](op, full)[i] for i in (0, 2, 1)])
    if mistake == "gate as up":
        monkeypatch.setattr(Gated, "write", lambda op, full: write[Gated](op, full)[::-1])
    if mistake in ("keys as values", "gate as up"):
        with pytest.raises(ArtifactError, match="The adapter was not exported: what was written fails its proof"):
            model.export_adapters(tmp_path / "out")
        assert not list(tmp_path.iterdir())
    model.export_adapters(tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    if mistake == "scale left out":
        config["lora_alpha"] = config["r"]
    if mistake == "one rank for all":
        config["alpha_pattern"] = {"o_proj": 4}
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    assert not llama.same(llama.logits(llama.theirs(tmp_path / "out")), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("for_", ["peft", "vllm"])
def test_the_pretrained_model(for_: str, tmp_path: Path) -> None:
    model = models.load("smollm2_135m", dtype="fp32")
    model.add_adapter(CanonicalLoRA(dim=8))
    shake(model, 0.01)
    model.eval().export_adapters(tmp_path / "out", for_=for_)
    base = AutoModelForCausalLM.from_pretrained(model.checkpoint_dir, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        found, wanted = theirs(tokens()).logits, model(tokens())
        with model.adapters_disabled():
            assert (model(tokens()) - wanted).abs().max() > 0.05 * wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
