"""For vLLM: one rank that it knows, one scale for all, nothing that its loader does not read, and the same logits."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from graftwork.peft import PEFT, CanonicalLoRA, LoRA
from tests.exchange.desk import Desk

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's max_lora_rank may be."""


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.mark.parametrize(
    ("transform", "rank"),
    [
        (LoRA(dim=4, alpha=8, dropout=0.1, dropout_position="post"), 8),
        (LoRA(dim=5, use_rslora=True, rank_pattern={"linear_proj": 9}, alpha_pattern={"linear_fc2": 3}), 16),
        (CanonicalLoRA(dim=1, target_modules=["linear_q", "linear_v"], layers=[1]), 1),
        (CanonicalLoRA(dim=8, rank_pattern={"linear_q": 2}), 8),
    ],
    ids=str,
)
def test_it_obeys_vllms_rules(transform: PEFT, rank: int, desk: Desk, tmp_path: Path) -> None:
    model = desk.grafted(transform)
    wanted = desk.logits(model)
    model.export_adapters(tmp_path / "out", for_="vllm")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == rank and rank in RANKS and config["lora_alpha"] == rank
    assert config["bias"] == "none" and config["modules_to_save"] is None
    assert not {"use_dora", "use_rslora", "rank_pattern", "alpha_pattern"} & config.keys()
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        module, side = key.removesuffix(".weight").rsplit(".", 1)
        assert key.startswith("base_model.model.model.layers.") and module.rsplit(".", 1)[1] in names
        assert tensor.shape[0 if side == "lora_A" else 1] == rank and side in ("lora_A", "lora_B")
    assert desk.changes(wanted) and desk.same(desk.logits(desk.theirs(tmp_path / "out")), wanted)
