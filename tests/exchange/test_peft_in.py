"""Adapters in: what Hugging Face PEFT has made gives its logits here, and training goes on."""

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork import models
from graftwork.errors import ArtifactError
from graftwork.models.exchange.partial import PartialContents
from graftwork.models.weights.ops import QKV
from graftwork.parallel.record import record_of
from graftwork.peft import IA3, CanonicalLoRA, DoRA, LoRA, PromptTuning
from graftwork.peft.artifact.tensors import Contents
from graftwork.peft.trained import TrainedTensor
from tests.exchange.desk import EVERY, Desk, equal, factors
from tests.peft.hf_lora import loss, tokens

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wi", "wo"],
}
SOME = {
    "llama": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "t5": ["q", "v"],
}
SCALED = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "phi3": (["qkv_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
}
PATTERNS = {
    "llama": ({"layers.1.mlp.down_proj": 2, "k_proj": 3}, {"v_proj": 5}),
    "gpt2": ({"h.1.mlp.c_proj": 2}, {"c_attn": 5}),
    "phi3": ({"layers.1.mlp.down_proj": 2}, {"qkv_proj": 5}),
    "t5": ({"block.1.layer.0.SelfAttention.k": 3}, {"EncDecAttention.v": 5}),
}
FUSED = ("gpt2", "phi3")
"""Families whose checkpoints hold queries, keys and values as one tensor."""
KINDS = ("lora", "some", "patterns", "layers", "dora", "dora_some", "ia3", "prompt", "ptuning", "ptuning_lstm")


def like(family: str) -> str:
    return "t5" if family in ("t5", "t5v11", "mt5") else family if family in FUSED else "llama"


def config_of(kind: str, family: str) -> peft.PeftConfig:
    """Return a config of Hugging Face PEFT."""
    name = like(family)
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    if kind == "ia3":
        targets, second = SCALED[name]
        # queries are left alone; where they are fused the test makes their part of the one vector ones
        return peft.IA3Config(task_type=task, target_modules=targets, feedforward_modules=second)
    if kind == "prompt":
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
    if kind.startswith("ptuning"):
        how = "LSTM" if kind.endswith("lstm") else "MLP"
        return peft.PromptEncoderConfig(
            task_type=task, num_virtual_tokens=3, encoder_hidden_size=6, encoder_reparameterization_type=how
        )
    ranks, alphas = PATTERNS[name] if kind == "patterns" else ({}, {})
    return peft.LoraConfig(
        task_type=task,
        r=4,
        lora_alpha=8,
        target_modules=(SOME if kind.endswith("some") else LINEARS)[name],
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=kind in ("patterns", "dora_some"),
        use_dora=kind.startswith("dora"),
        layers_to_transform=[1] if kind == "layers" else None,
        lora_dropout=0.1,
    )


@pytest.fixture(scope="module", params=EVERY)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(request.param, tmp_path_factory.mktemp(request.param) / "hf")


def leave_queries(model: Any, width: int) -> None:
    """Make ones of what an IA3 of fused projections does to queries."""
    for module in model.modules():
        if hasattr(module, "ia3_l") and module.ia3_l["default"].shape[0] > 1:
            module.ia3_l["default"].data[:width] = 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_our_logits_are_theirs(kind: str, desk: Desk, tmp_path: Path) -> None:
    theirs = desk.made(config_of(kind, desk.family), tmp_path / "hf")
    if kind == "ia3" and desk.family in FUSED:
        leave_queries(theirs, 48)
        theirs.save_pretrained(tmp_path / "hf")
    wanted = desk.logits(theirs)
    model = desk.clear()
    model.load_adapters(tmp_path / "hf")
    model.eval()
    found = desk.logits(model)
    assert desk.changes(wanted) and desk.same(found, wanted)
    ((name, transform),) = model.adapters.items()
    assert name == transform.short_name() and any(p.requires_grad for p in model.parameters())
    expected = {"ia3": IA3, "prompt": PromptTuning, "dora": DoRA, "dora_some": DoRA}
    if kind in expected:
        assert type(transform) is expected[kind]
    elif kind.startswith("ptuning"):
        assert isinstance(transform, PromptTuning) and transform.placement == "before_bos"
    else:
        assert type(transform) is (LoRA if desk.family in FUSED else CanonicalLoRA) and transform.dropout == 0.1
    model.export_adapters(tmp_path / "again")
    if kind in ("lora", "some", "patterns", "layers", "prompt") or (kind.startswith("dora") and desk.family in FUSED):
        first, second = (load_file(tmp_path / where / TENSORS) for where in ("hf", "again"))
        if kind == "prompt":  # of a decoder's rows, which nothing reads, nothing is kept
            first, second = ({key: tensor[:3] for key, tensor in held.items()} for held in (first, second))
        assert equal(first, second), "what came in goes out, bit for bit"
    else:
        assert desk.same(desk.logits(desk.theirs(tmp_path / "again")), wanted)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk("llama", tmp_path_factory.mktemp("llama") / "hf")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_goes_on_with_the_same_gradients(kind: str, llama: Desk, tmp_path: Path) -> None:
    theirs = llama.made(config_of(kind, "llama"), tmp_path / "hf")
    model = llama.clear()
    model.load_adapters(tmp_path / "hf")
    model.eval()
    model.zero_grad()
    for side in (model, theirs):
        logits = side(tokens()) if side is model else side(tokens()).logits
        loss(logits).backward()
    layer = theirs.base_model.model.model.layers[2].self_attn
    (name,) = model.adapters
    site = "decoder.layers.2.self_attention.linear_qkv"
    (adapter,) = (item.adapter for item in model.stack.grafted[name] if item.site.name == site)
    for number, part in enumerate("qkv"):
        wanted = getattr(layer, f"{part}_proj").lora_A["default"].weight.grad
        if kind == "lora":
            found = adapter.get_parameter(f"linear_{part}_lora_A").grad
        else:  # one pair for all: its rows in turn
            found = adapter.lora_A.grad[4 * number : 4 * number + 4]
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(dtype: torch.dtype, llama: Desk, tmp_path: Path) -> None:
    llama.made(config_of("lora", "llama"), tmp_path / "hf")
    held = {key: tensor.to(dtype) for key, tensor in load_file(tmp_path / "hf" / TENSORS).items()}
    save_file(held, tmp_path / "hf" / TENSORS)
    model = llama.clear()
    model.load_adapters(tmp_path / "hf", names=["mine"])
    model.export_adapters(tmp_path / "again")
    assert list(model.adapters) == ["mine"]
    assert equal(load_file(tmp_path / "again" / TENSORS), {key: tensor.float() for key, tensor in held.items()})


def test_it_waits_for_the_model_and_must_still_be_there(llama: Desk, tmp_path: Path) -> None:
    llama.made(config_of("lora", "llama"), tmp_path / "hf")
    shape, checkpoint = llama.ours.shape, str(llama.directory)
    model = models.GPT(shape, checkpoint=checkpoint, dtype="fp32")
    model.load_adapters(tmp_path / "hf", trainable=False)
    model.configure_model()
    assert list(model.adapters) == ["canonical_lora"] and not any(p.requires_grad for p in model.parameters())
    other = models.GPT(shape, checkpoint=checkpoint, dtype="fp32")
    other.load_adapters(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / CONFIG).read_text())
    (tmp_path / "hf" / CONFIG).write_text(json.dumps({**config, "lora_alpha": 9}))
    with pytest.raises(ArtifactError, match="is not the one that was there"):
        other.configure_model()


def test_values_go_into_what_is_attached(llama: Desk, tmp_path: Path) -> None:
    model = llama.grafted(LoRA(dim=4))
    went = factors(model)
    model.export_adapters(tmp_path / "out")
    back = llama.clear()
    back.load_adapters(tmp_path / "out")
    for tensor in back.stack.tensors("lora"):
        tensor.parameter.data.zero_()
    back.load_adapters(tmp_path / "out")
    assert equal(factors(back), went)
    llama.made(config_of("some", "llama"), tmp_path / "other")
    with pytest.raises(ArtifactError, match="already has another adapter named 'lora'"):
        back.load_adapters(tmp_path / "other", names=["lora"])


def test_an_encoder_that_is_not_there_is_said(llama: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama.made(config_of("ptuning", "llama"), tmp_path / "hf")
    with caplog.at_level(logging.INFO, logger="graftwork"):
        llama.clear().load_adapters(tmp_path / "hf")
    assert "arrives as PromptTuning 'prompt_tuning': the file holds no encoder" in caplog.text


@pytest.mark.fault(
    "an adapter of Hugging Face PEFT arrives with key and value rows in each other's place, or with another scale",
    "its logits are compared with PEFT's",
)
@pytest.mark.parametrize("mistake", ["keys as values", "patterns forgotten", "lengths forgotten"])
def test_the_comparison_notices_a_mistake(
    mistake: str, llama: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"patterns forgotten": "patterns"}.get(mistake, "dora_some" if mistake == "lengths forgotten" else "dora")
    wanted = llama.logits(llama.made(config_of(kind, "llama"), tmp_path / "hf"))
    join = QKV.join
    if mistake == "keys as values":
        monkeypatch.setattr(QKV, "join", lambda op, parts: join(op, [parts[0], parts[2], parts[1]]))
    if mistake == "patterns forgotten":
        monkeypatch.setattr("graftwork.models.exchange.pairs.patterns", _no_alphas)
    if mistake == "lengths forgotten":
        monkeypatch.setattr(PartialContents, "value", _ones_instead)
    model = llama.clear()
    model.load_adapters(tmp_path / "hf")
    assert not llama.same(llama.logits(model.eval()), wanted)


def _no_alphas(values: dict[str, float], usual: float) -> dict[str, float]:
    return {name: value for name, value in values.items() if usual == 4 and value != usual}


def _ones_instead(held: Contents, tensor: TrainedTensor) -> Tensor:
    record = record_of(tensor.parameter)
    return torch.nan_to_num(record.sharding.read(held.stored[tensor.key], *record.place), nan=1.0)
