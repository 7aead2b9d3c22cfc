"""Selective trains the base's own tensors as transformers would, saves them whole and gives the originals back."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import Tensor

from graftwork import models
from graftwork.errors import MatchError, TrainingError
from graftwork.models import GPT
from graftwork.optim import AdamW
from graftwork.parallel.record import record_of
from graftwork.peft import LoRA, Selective
from graftwork.peft.methods.selective import names_tensor
from graftwork.training.callbacks import Interrupted
from tests.contracts.methods import base_values, loss, make, same, shake, tokens
from tests.helpers import tiny_run
from tests.helpers.tiny_hf import ODD_VOCABULARY, make_tiny, oracle
from tests.helpers.tiny_run import finetune

TOLERANCE, STEPS = 1e-5, 3
LEARNING = {"lr": 1e-2, "eps": 1e-3}
"""With Adam's own small eps the rounding of a key bias's gradient, which is zero, would become a step."""
CASES: list[tuple[str, list[str] | None, Any]] = [
    ("gpt2", None, lambda n: n.endswith(".bias")),
    ("llama_bias", None, lambda n: n.endswith(".bias")),
    ("nemotron", ["norm"], lambda n: "norm" in n),
    ("qwen3", ["norm"], lambda n: "norm" in n),
    ("gpt2", ["norm", "linear_proj.weight"], lambda n: ".ln_" in n or "attn.c_proj.weight" in n),
    ("llama_tied", ["word_embeddings"], lambda n: "embed_tokens" in n),
    ("gpt2", ["word_embeddings", "position_embeddings"], lambda n: ".wte." in n or ".wpe." in n),
    ("llama", ["layers.1.mlp", "output_layer"], lambda n: "layers.1.mlp" in n or "lm_head" in n or POST_NORM in n),
    ("llama", ["*"], lambda n: True),
]
POST_NORM = "layers.1.post_attention_layernorm"
"""A norm inside of the linear behind it belongs to that linear's module."""


def ids() -> Tensor:
    return torch.randint(ODD_VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(5))


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    found = model(ids())
    logits = found if isinstance(found, Tensor) else found.logits
    optimizer.zero_grad()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    optimizer.step()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize(("family", "patterns", "theirs_too"), CASES)
def test_it_trains_as_transformers_does(
    family: str, patterns: list[str] | None, theirs_too: Any, tmp_path: Path
) -> None:
    directory = make_tiny(family, tmp_path / "hf")
    ours, theirs = models.load(directory), oracle(directory)
    ours.add_adapter(Selective(patterns=patterns))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(theirs_too(name))
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == count > 0
    mine, _ = AdamW(**LEARNING, schedule="constant").build(ours, STEPS)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **LEARNING, weight_decay=0.0)
    with torch.no_grad():
        before = theirs(ids()).logits
    for _ in range(STEPS):
        step(ours, mine)
        step(theirs, other)
    with torch.no_grad():
        wanted = theirs(ids()).logits
        assert (wanted - before).abs().max() > 1e-2
        assert_close(ours(ids()), wanted)
        ours.export_hf(tmp_path / "trained")
        assert_close(oracle(tmp_path / "trained")(ids()).logits, wanted)
        with ours.adapters_disabled():
            assert_close(ours(ids()), before)


def adapted(family: str = "gpt2", patterns: list[str] | None = None, **options: Any) -> GPT:
    model = make(family, **options)
    model.add_adapter(Selective(patterns=patterns))
    return model


def train(model: GPT, steps: int = STEPS, lr: float = 1e-2) -> torch.optim.Optimizer:
    optimizer, _ = AdamW(lr=lr, schedule="constant").build(model, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return optimizer


def logits(model: GPT) -> Tensor:
    with torch.no_grad():
        return model(tokens())


@pytest.mark.parametrize(
    ("family", "patterns"), [("gpt2", ["bias", "word_embeddings"]), ("qk_norm", ["norm"]), ("llama", ["linear_qkv"])]
)
def test_saved_whole_loaded_and_given_back(family: str, patterns: list[str], tmp_path: Path) -> None:
    model, twin = adapted(family, patterns), make(family)
    train(model)
    model.save_adapters(tmp_path / "adapter")
    lent = {t.key: t.parameter.detach() for t in model.stack.tensors("selective")}
    assert same(
        dict(sorted(lent.items())), dict(sorted(load_file(tmp_path / "adapter/adapter_model.safetensors").items()))
    )
    base, before = logits(twin), base_values(twin)
    flags = [p.requires_grad for p in twin.parameters()]
    twin.load_adapters(tmp_path / "adapter")
    assert torch.equal(logits(twin), logits(model)) and not torch.equal(logits(twin), base)
    with twin.adapters_disabled():
        assert torch.equal(logits(twin), base)
    twin.delete_adapter("selective")
    assert torch.equal(logits(twin), base) and same(base_values(twin), before)
    assert [p.requires_grad for p in twin.parameters()] == flags
    assert not twin.adapters and {record_of(p).owner for p in twin.parameters()} == {None}


def test_merging_keeps_the_values_until_unmerged(tmp_path: Path) -> None:
    model = make("gpt2")
    base = logits(model)
    model.add_adapter([Selective(patterns=["bias", "linear_fc1"]), LoRA(dim=4)])
    shake(model, 0.05)
    live, values = logits(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    model.merge_adapters(["selective"])
    assert torch.equal(logits(model), live) and model.stack.merged
    with pytest.raises(MatchError, match="unmerge first"):
        model.delete_adapter("selective")
    model.merge_adapters()
    assert_close(logits(model), live)
    with model.adapters_disabled():
        assert torch.equal(logits(model), base)
    model.unmerge_adapters()
    assert torch.equal(logits(model), live) and same(values, dict(model.named_parameters()))
    with model.adapters_disabled():
        assert torch.equal(logits(model), base)
    for name in ("lora", "selective"):
        model.delete_adapter(name)
    assert torch.equal(logits(model), base)


def test_small_steps_on_a_bf16_base_are_not_lost() -> None:
    """A step of lr is far below half of what bf16 resolves at 1: only a master in fp32 can add them up."""
    model = adapted("llama", ["layer_norm"], dtype="bf16")
    with torch.no_grad():
        for tensor in model.stack.tensors("selective"):
            tensor.parameter.fill_(1.0)
    assert torch.ones((), dtype=torch.bfloat16) + 5e-4 == 1.0
    optimizer = train(model, steps=24, lr=5e-4)
    for tensor in model.stack.tensors("selective"):
        master = optimizer.state[tensor.parameter]["master"]
        assert master.dtype == torch.float32 and torch.equal(tensor.parameter, master.bfloat16())
        assert (tensor.parameter != 1.0).any() and 5e-3 < (master - 1.0).abs().max() < 15e-3


@pytest.mark.fault(
    "two adapters train one tensor of the base",
    "the second is refused, naming the first",
)
def test_one_tensor_has_one_owner() -> None:
    model = adapted("gpt2", ["bias"])
    with pytest.raises(MatchError, match=r"'norms' cannot train .*layer_norm_bias: adapter 'selective' does"):
        model.add_adapter(Selective("norms", patterns=["norm"]))
    with pytest.raises(MatchError, match="'all' cannot train .*: adapter 'selective' does; leave it out of one"):
        model.add_adapter([LoRA(dim=2), Selective("all", patterns=["*"])])
    assert list(model.adapters) == ["selective"]
    model.add_adapter(Selective("weights", patterns=["*.layer_norm_weight", "linear_fc2.weight"]))
    assert {record_of(p).owner for p in model.parameters() if p.requires_grad} == {"selective", "weights"}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {}, r"target 'bias' matches no tensor; valid: .*linear_qkv"),
        ("gpt2", {"patterns": ["linear_qvk.bias", "norm"]}, "'linear_qvk.bias' matches no tensor; did you mean"),
        ("gpt2", {"patterns": ["final_layernorm"], "layers": [1]}, r"matches no tensor in layers \[1\]"),
        ("gpt2", {"layers": [2]}, "layers has 2, but the model's layers are 0 to 1"),
        ("llama_tied", {"patterns": ["output_layer"]}, "'output_layer' matches no tensor"),
    ],
)
def test_what_does_not_exist_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    model = make(family)
    with pytest.raises(MatchError, match=message) as caught:
        model.add_adapter(Selective(**options))
    assert "\n" not in str(caught.value) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("pattern", "name", "named"),
    [
        ("bias", "decoder.layers.0.mlp.linear_fc1.layer_norm_bias", True),
        ("bias", "encoder.layers.0.self_attention.relative_attention_bias.weight", False),
        ("norm", "decoder.layers.0.self_attention.k_layernorm.weight", True),
        ("norm", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight", True),
        ("norm", "decoder.layers.0.mlp.linear_fc1.weight", False),
        ("layer_norm", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight", True),
        ("layers.1", "decoder.layers.11.mlp.linear_fc1.weight", False),
        ("layers.1", "decoder.layers.1.mlp.linear_fc1.weight", True),
        ("decoder.*.mlp", "decoder.layers.1.mlp.linear_fc1.weight", True),
        ("mlp.weight", "decoder.layers.1.mlp.linear_fc1.weight", False),
    ],
)
def test_what_a_pattern_means(pattern: str, name: str, named: bool) -> None:
    assert names_tensor(pattern, name) is named


def test_layers_are_selected() -> None:
    model = make("gpt2")
    model.add_adapter(Selective(layers=[1]))
    assert {t.site.split(".")[2] for t in model.stack.tensors("selective")} == {"1"}


class Spoil(Callback):
    """Lets no gradient through to one tensor."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Choose the last one."""
        list(pl_module.stack.tensors("selective"))[-1].parameter.register_hook(torch.zeros_like)


def run(data: Path, root: Path, callbacks: list[Callback], **options: Any) -> GPT:
    model = tiny_run.model(dtype="bf16")
    trainer = tiny_run.trainer(root, max_steps=4, limit_val_batches=0, callbacks=callbacks, **options)
    finetune(model, trainer, tiny_run.data_module(data), [LoRA(dim=4), Selective(patterns=["norm"])], tiny_run.optim())
    return model


@pytest.mark.fault(
    "a tensor of the base that should train gets no gradient",
    "the first step names it",
)
def test_a_tensor_without_a_gradient_stops_the_run(tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path)
    with pytest.raises(TrainingError, match=r"no gradient reaches decoder.final_layernorm.weight: it would keep"):
        run(tmp_path, tmp_path / "run", [Spoil()])


def test_a_cut_run_is_resumed_bit_for_bit_over_a_bf16_base(tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path)
    whole = run(tmp_path, tmp_path / "whole", [])
    with pytest.raises(Interrupted):
        run(tmp_path, tmp_path / "cut", [tiny_run.StopAfter(2)])
    resumed = run(tmp_path, tmp_path / "cut", [])
    for name in ("lora", "selective"):
        for found, wanted in zip(resumed.stack.tensors(name), whole.stack.tensors(name), strict=True):
            assert found.key == wanted.key and torch.equal(found.value, wanted.value)
    with resumed.adapters_disabled():
        base = tiny_run.model(dtype="bf16")
        base.configure_model()
        assert torch.equal(resumed(tokens()), base(tokens()))
