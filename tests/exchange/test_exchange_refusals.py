"""What cannot be the same on the other side is refused by name, and model and disk stay as they were."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork.errors import GraftworkError
from graftwork.models.base import Model
from graftwork.models.exchange.directory import export_directory
from graftwork.models.exchange.export import Wanted
from graftwork.peft import IA3, PEFT, CanonicalAdapter, DoRA, LoRA, PromptTuning, PTuning, Selective
from tests.contracts.methods import make
from tests.exchange.desk import Desk
from tests.exchange.test_peft_in import CONFIG, TENSORS, config_of
from tests.helpers.tiny_t5 import tiny

Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


class Other(LoRA):
    """A method of a user's own, which may compute anything."""


OUT: dict[str, tuple[Callable[[], Model], PEFT, dict[str, Any], str]] = {
    "a bottleneck": (make, CanonicalAdapter(dim=4), {}, "Hugging Face PEFT has no bottleneck adapters; serve it here"),
    "a user's own": (make, Other(dim=4), {}, "Other 'lora' cannot be exported: Hugging Face PEFT has no such method"),
    "the base's own": (make, Selective(patterns=["norm"]), {}, "holds tensors of the base itself.*; merge it"),
    "keys behind a norm": (lambda: make("qk_norm"), IA3(), {}, 'scales keys behind k_layernorm.*"pre_norm"'),
    "dropout behind B": (
        make,
        LoRA(dim=4, dropout=0.1, dropout_position="post"),
        {},
        "dropout_position='post', but Hugging Face PEFT drops values before A only",
    ),
    "behind BOS": (make, PromptTuning(init="random"), {}, "placement='prefix'.*stand behind BOS.*before_bos"),
    "in a template": (
        make,
        PromptTuning(init="random", placement="template"),
        {},
        "placement='template'.*stand where a template says",
    ),
    "T5's embedding": (tiny, LoRA(dim=4, target_modules=["word_embeddings"]), {}, "encoder and decoder of a t5 share"),
    "DoRA for vLLM": (
        make,
        DoRA(dim=4),
        {"for_": "vllm"},
        "by vLLM: it refuses adapters with use_dora",
    ),
    "IA3 for vLLM": (make, IA3(), {"for_": "vllm"}, "cannot be served by vLLM: it serves LoRA only; merge it"),
    "prompts for vLLM": (make, PromptTuning(init="random"), {"for_": "vllm"}, "it serves LoRA only"),
    "an encoder for vLLM": (make, PTuning(virtual_tokens=2), {"for_": "vllm"}, "it serves LoRA only"),
    "GPT-2 for vLLM": (lambda: make("gpt2"), LoRA(dim=4), {"for_": "vllm"}, "its GPT-2 takes no LoRA"),
    "T5 for vLLM": (tiny, LoRA(dim=4), {"for_": "vllm"}, "it has no encoder-decoder"),
    "a rank too high for vLLM": (make, LoRA(dim=513), {"for_": "vllm"}, "has rank 513, but vLLM serves at most 512"),
    "a head for vLLM": (
        make,
        LoRA(dim=4, target_modules=["output_layer"]),
        {"for_": "vllm"},
        "stands at lm_head, where not every model of vLLM takes LoRA",
    ),
    "another format": (make, LoRA(dim=4), {"format": "gguf"}, "format is 'gguf'; valid: peft"),
    "another reader": (make, LoRA(dim=4), {"for_": "vlm"}, "for_ is 'vlm'; did you mean 'vllm'"),
    "no such adapter": (make, LoRA(dim=4), {"names": ["lori"]}, "has no adapter 'lori'; did you mean 'lora'"),
    "no adapter": (make, LoRA(dim=4), {"names": []}, "No adapter was named to be exported"),
}


@pytest.mark.parametrize("case", OUT)
def test_what_has_no_exact_counterpart_does_not_go_out(case: str, tmp_path: Path) -> None:
    model_of, transform, options, message = OUT[case]
    model = model_of()
    model.add_adapter(transform)
    with pytest.raises(GraftworkError, match=message) as caught:
        model.export_adapters(tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_an_artifact_is_refused_as_its_model_is(tmp_path: Path) -> None:
    model = make()
    model.add_adapter([LoRA(dim=4), CanonicalAdapter(dim=4)])
    model.save_adapters(tmp_path / "adapter")
    with pytest.raises(GraftworkError, match="CanonicalAdapter 'canonical_adapter' cannot be exported"):
        export_directory(tmp_path / "adapter", tmp_path / "out", Wanted(), lambda: None)
    assert not (tmp_path / "out").exists()


def test_company_at_the_same_modules_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    model.add_adapter([LoRA(dim=4), IA3(targets=["ffn"]), LoRA("proj", dim=4, target_modules=["linear_proj"])])
    with caplog.at_level(logging.WARNING, logger="graftwork"):
        model.export_adapters(tmp_path / "out", names=["ia3", "proj"])
        assert not caplog.records
        model.export_adapters(tmp_path / "out", names=["lora", "ia3"])
    assert "'lora' and 'ia3' stand at the same modules, such as decoder.layers.0.mlp.linear_fc2" in caplog.text


def test_an_export_starts_from_an_adapter_of_ours(tmp_path: Path) -> None:
    model = make()
    model.add_adapter(LoRA(dim=4))
    model.export_adapters(tmp_path / "theirs")
    with pytest.raises(GraftworkError, match=r"but a Hugging Face PEFT LORA adapter: load it with model.load_adapters"):
        export_directory(tmp_path / "theirs", tmp_path / "out", Wanted(), lambda: None)


@pytest.mark.parametrize("there", ["notes", "an artifact", "a file"])
def test_nothing_but_an_export_is_replaced(there: str, tmp_path: Path) -> None:
    model = make()
    model.add_adapter(LoRA(dim=4))
    path = tmp_path / "out"
    if there == "a file":
        path.write_text("mine")
    else:
        model.save_adapters(path)
        if there == "notes":
            (path / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(GraftworkError, match="is no exported adapter|is a file"):
        model.export_adapters(path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_no_number_no_export(tmp_path: Path) -> None:
    model = make()
    model.add_adapter(LoRA(dim=4))
    model.export_adapters(tmp_path / "out")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    next(model.stack.adapters("lora")).lora_B.data[3] = float("nan")
    with pytest.raises(GraftworkError, match="The adapter was not exported: tensor .* holds NaN or Inf"):
        model.export_adapters(tmp_path / "out")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def field(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**config, **values}))

    return change


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        held = load_file(path / TENSORS)
        change(held)
        save_file(held, path / TENSORS)

    return rewrite


def pickled(path: Path) -> None:
    torch.save(load_file(path / TENSORS), path / "adapter_model.bin")
    (path / TENSORS).unlink()


IN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "biases": (field(bias="lora_only"), "bias='lora_only', which cannot be honoured; valid: 'none'"),
    "whole modules": (field(modules_to_save=["lm_head"]), "modules_to_save="),
    "parameters": (field(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters="),
    "more layers": (field(layer_replication=[[0, 2], [1, 3]]), "layer_replication="),
    "a bias of B": (field(lora_bias=True), "lora_bias=True"),
    "tokens": (field(trainable_token_indices=[1]), "trainable_token_indices="),
    "activated": (field(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens="),
    "quantised": (field(loftq_config={"loftq_bits": 4}), "loftq_config="),
    "another base": (field(init_lora_weights="pissa"), "init_lora_weights='pissa', which cannot be honoured"),
    "tied": (field(ensure_weight_tying=True), "ensure_weight_tying=True"),
    "of the future": (field(use_newest=3), "use_newest=3, which cannot be honoured; it would change"),
    "another method": (field(peft_type="LOKR"), "peft_type='LOKR', which cannot be honoured; valid: LORA, IA3"),
    "a classifier": (field(task_type="SEQ_CLS"), "task_type='SEQ_CLS', which cannot be honoured"),
    "another task": (field(task_type="SEQ_2_SEQ_LM"), "task_type=.*the base is a llama"),
    "an expression": (field(target_modules=".*_proj"), "target_modules='.*_proj'.*a list of module names is needed"),
    "an expression of ranks": (field(rank_pattern={"^q_.*": 2}), "rank_pattern=.*signs of regular expressions"),
    "no targets": (field(target_modules=None), "target_modules=None"),
    "other targets": (field(target_modules=["query"]), "target_modules=.*this llama has no such module"),
    "no rank": (field(r=0), "r=0, which cannot be honoured; a whole number"),
    "half a rank": (field(rank_pattern={"q_proj": 2.5}), "rank_pattern=.*ranks are whole numbers"),
    "another rank": (field(r=8), r"has shape \[4, 48\], but the model needs \[8, 48\]"),
    "no scale": (field(lora_alpha="8"), "lora_alpha='8'.*a number is needed"),
    "scale zero": (field(lora_alpha=0), "alpha must be above 0"),
    "dropout": (field(lora_dropout=1.0), r"dropout must be in \[0, 1\)"),
    "a switch": (field(use_dora="yes"), "use_dora='yes'.*true or false"),
    "more targets": (
        field(target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]),
        "lacks the tensor .*k_proj",
    ),
    "fewer targets": (field(target_modules=["q_proj", "v_proj"]), "holds 8 tensors too many, e.g. .*up_proj"),
    "lengths": (field(use_dora=True), "lacks the tensor .*lora_magnitude_vector"),
    "a missing tensor": (tensors(lambda t: t.pop(Q)), f"lacks the tensor '{Q}'"),
    "an extra tensor": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        "holds 1 tensors too many, e.g. 'base_model.model.lm_head.weight'",
    ),
    "a wrong shape": (
        tensors(lambda t: t.update({Q: t[Q].T.contiguous()})),
        r"has shape \[4, 48\], .* needs \[48, 4\]",
    ),
    "no number": (tensors(lambda t: t[Q].__setitem__((0, 0), float("nan"))), f"Tensor '{Q}' in .* holds NaN or Inf"),
    "double precision": (
        tensors(lambda t: t.update({Q: t[Q].double()})),
        "stored as 'F64'; an adapter's are F32",
    ),
    "a pickle": (pickled, "holds no adapter_model.safetensors, only 'adapter_model.bin', which may run code"),
    "truncated": (lambda path: (path / TENSORS).write_bytes((path / TENSORS).read_bytes()[:-9]), "truncated|damaged"),
    "rubbish": (lambda path: (path / TENSORS).write_bytes(b"\0" * 40), "cannot be read"),
    "a list": (lambda path: (path / CONFIG).write_text("[]"), "is no adapter of graftwork"),
    "half a config": (lambda path: (path / CONFIG).write_text('{"peft_type": "LORA"'), "not valid JSON"),
    "two names": (lambda path: None, "holds one adapter; names takes the one name"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk("llama", tmp_path_factory.mktemp("llama") / "hf")


@pytest.mark.fault(
    "an adapter of another library is read as far as it goes: fields and tensors that mean more are left out silently",
    "a list of fields known to change nothing; everything else that is set is refused by name, and so is every tensor",
)
@pytest.mark.parametrize("case", IN)
def test_what_would_change_the_result_does_not_come_in(case: str, llama: Desk, tmp_path: Path) -> None:
    change, message = IN[case]
    path = tmp_path / "hf"
    llama.made(config_of("some", "llama"), path)
    change(path)
    model = llama.clear()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(GraftworkError, match=message) as caught:
        model.load_adapters(path, names=["a", "b"] if case == "two names" else None)
    assert "\n" not in str(caught.value)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and not model.adapters
    assert all(after[n].requires_grad == flag and torch.equal(after[n], value) for n, (flag, value) in before.items())


def test_without_a_change_it_comes_in(llama: Desk, tmp_path: Path) -> None:
    """The refusals above are about the change."""
    llama.made(config_of("some", "llama"), tmp_path / "hf")
    field(use_newest=None, layers_pattern=[], qalora_group_size=8, target_parameters=[])(tmp_path / "hf")
    llama.clear().load_adapters(tmp_path / "hf")


@pytest.mark.parametrize(
    ("targets", "second", "message"),
    [
        (["q_proj", "v_proj", "down_proj"], ["down_proj"], "it scales the outputs of .*q_proj, where no IA3 of ours"),
        (["k_proj", "v_proj", "up_proj"], ["up_proj"], "it scales the inputs of .*up_proj"),
        (
            ["v_proj", "0.self_attn.k_proj"],
            [],
            "scales the same in each of its layers, but .*1.self_attn.k_proj",
        ),
    ],
)
def test_scales_that_ours_has_no_place_for(
    targets: list[str], second: list[str], message: str, llama: Desk, tmp_path: Path
) -> None:
    llama.made(peft.IA3Config(target_modules=targets, feedforward_modules=second), tmp_path / "hf")
    with pytest.raises(GraftworkError, match=message):
        llama.clear().load_adapters(tmp_path / "hf")


def test_scales_of_queries_in_a_fused_module(tmp_path: Path) -> None:
    desk = Desk("gpt2", tmp_path / "base")
    desk.made(config_of("ia3", "gpt2"), tmp_path / "hf")
    with pytest.raises(GraftworkError, match="it scales queries too, at transformer.h.0.attn.c_attn"):
        desk.ours.load_adapters(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_virtual_tokens": 4}, r"has shape \[3, 48\], but the model needs \[4, 48\]"),
        ({"token_dim": 64}, "token_dim=64, which cannot be honoured; the model's hidden size is 48"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2.*a llama has 1"),
        ({"prefix_projection": True}, "prefix_projection=True"),
    ],
)
def test_prompts_of_another_model(change: dict[str, Any], message: str, llama: Desk, tmp_path: Path) -> None:
    llama.made(config_of("prompt", "llama"), tmp_path / "hf")
    field(**change)(tmp_path / "hf")
    with pytest.raises(GraftworkError, match=message):
        llama.clear().load_adapters(tmp_path / "hf")
