"""A base with adapters folded in, written without a model: what ``merge_adapters`` and PEFT's own merge give."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from graftwork import models
from graftwork.errors import ArtifactError, CheckpointError, GraftworkError, MatchError
from graftwork.models.merging import changes, merge_directory, updates, write
from graftwork.models.merging.source import Source
from graftwork.models.weights.ops import QKV
from graftwork.peft import IA3, PEFT, CanonicalAdapter, CanonicalLoRA, DoRA, LoRA, PromptTuning, PTuning, Selective
from tests.contracts.methods import make, shake
from tests.exchange.desk import EVERY, Desk
from tests.exchange.test_peft_in import config_of
from tests.helpers.tiny_hf import make_tiny, tiny_model
from tests.helpers.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.peft.hf_lora import tokens

METHODS: dict[str, list[PEFT]] = {
    "lora": [LoRA(dim=4, alpha=8)],
    "lora_by_pattern": [LoRA(dim=4, use_rslora=True, layers=[1], rank_pattern={"mlp.linear_fc2": 2})],
    "lora_of_the_head": [LoRA(dim=4, target_modules=["output_layer", "linear_proj"])],
    "canonical": [
        CanonicalLoRA(dim=4, rank_pattern={"linear_q": 2, "linear_fc1_up": 3}, alpha_pattern={"linear_v": 7})
    ],
    "canonical_qv": [CanonicalLoRA(dim=4, target_modules=["linear_q", "linear_v"])],
    "dora": [DoRA(dim=4, use_rslora=True)],
    "ia3": [IA3(key_position="pre_norm")],
    "ia3_of_values": [IA3(targets=["v"], layers=[1])],
    "biases_and_norms": [Selective(patterns=["norm"])],
    "stack": [LoRA(dim=4), IA3(key_position="pre_norm"), DoRA(dim=2), Selective(patterns=["linear_fc2.weight"])],
}


def tensors(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two checkpoints are the same, bit for bit."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def oracle(desk: Desk, directory: Path) -> Any:
    """Return transformers' model of a directory, in fp32."""
    kind = AutoModelForSeq2SeqLM if desk.seq2seq else AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=EVERY)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk("llama", tmp_path_factory.mktemp("llama") / "hf")


@pytest.mark.parametrize("method", METHODS)
def test_every_bit_is_what_a_merged_model_exports(method: str, desk: Desk, tmp_path: Path) -> None:
    model = desk.grafted(*METHODS[method])
    wanted = desk.logits(model)
    assert desk.changes(wanted)
    model.save_adapters(tmp_path / "adapter")
    if method == "lora_of_the_head" and desk.ours.shape.tie_embeddings:
        with pytest.raises(MatchError, match="output_layer, whose weight is tied to the word embedding's"):
            merge_directory(tmp_path / "adapter", tmp_path / "merged", desk.directory)
        assert not (tmp_path / "merged").exists()
        return
    merge_directory(tmp_path / "adapter", tmp_path / "merged", desk.directory)
    model.merge_adapters()
    model.export_hf(tmp_path / "exported")
    folded = desk.logits(model)
    model.unmerge_adapters()
    assert identical(tensors(tmp_path / "merged"), tensors(tmp_path / "exported"))
    theirs = desk.logits(oracle(desk, tmp_path / "merged"))
    assert desk.same(theirs, folded)
    # weights that are rounded once more: T5's attention, which scales nothing, makes that grow
    assert (theirs - wanted).abs().max() <= 10 * desk.close * wanted.abs().max()


@pytest.mark.parametrize("kind", ["lora", "some", "patterns", "dora", "dora_some", "ia3"])
def test_an_adapter_of_peft_becomes_what_peft_merges(kind: str, desk: Desk, tmp_path: Path) -> None:
    theirs = desk.made(config_of(kind, desk.family), tmp_path / "theirs", 0.02)
    if kind == "ia3" and desk.family == "gpt2":
        with pytest.raises(ArtifactError, match="it scales queries too"):
            merge_directory(tmp_path / "theirs", tmp_path / "merged", desk.directory)
        return
    assert desk.changes(desk.logits(theirs))
    merge_directory(tmp_path / "theirs", tmp_path / "merged", desk.directory)
    folded = theirs.merge_and_unload()
    found, wanted = oracle(desk, tmp_path / "merged").state_dict(), folded.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


@pytest.mark.fault(
    "a merge misses rows, a scale or an adapter of a stack, and the model that is served is another one",
    "the directory is compared bit by bit with the merged model's export, and its logits with the adapted model's",
)
@pytest.mark.parametrize("mistake", ["no scale", "keys as values", "the base's own lengths", "one left out"])
def test_the_comparison_notices_a_mistake(
    mistake: str, llama: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama.grafted(LoRA(dim=4, alpha=8), CanonicalLoRA(dim=2), DoRA(dim=2, alpha=3))
    wanted = llama.logits(model)
    model.save_adapters(tmp_path / "adapter")
    if mistake == "no scale":
        monkeypatch.setattr(updates, "scale_of", lambda rank, alpha, rslora: 1.0)
    if mistake == "keys as values":
        write = QKV.write
        monkeypatch.setattr(QKV, "write", lambda op, full: [write(op, full)[i] for i in (0, 2, 1)])
    if mistake == "the base's own lengths":
        monkeypatch.setattr(changes, "rescaling", lambda magnitude, norm: torch.ones_like(norm))
    names = ["lora", "dora"] if mistake == "one left out" else None
    if names is None:
        with pytest.raises(ArtifactError, match="The adapter was not merged: what was written fails its proof"):
            merge_directory(tmp_path / "adapter", tmp_path / "merged", llama.directory)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    merge_directory(tmp_path / "adapter", tmp_path / "merged", llama.directory, names, verify=False)
    found = llama.logits(oracle(llama, tmp_path / "merged"))
    assert not (found - wanted).abs().max() <= 10 * llama.close * wanted.abs().max()


def sharded(directory: Path, dtype: str = "bfloat16", **config: Any) -> Path:
    """Write a base of several files with everything that goes with its weights."""
    tiny_model("llama", vocab_size=300, **config).to(getattr(torch, dtype)).save_pretrained(
        directory, max_shard_size="120KB"
    )
    tiny_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


def adapted(base: Path, path: Path, *transforms: PEFT, dtype: str | None = None) -> Any:
    """Return our model of a base with adapters that were moved and saved to ``path``."""
    model = models.load(base, dtype=dtype)
    model.add_adapter(list(transforms))
    shake(model, 0.05)
    model.eval().save_adapters(path)
    return model


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_a_sharded_base_with_all_that_goes_with_it(dtype: str | None, tmp_path: Path) -> None:
    base = sharded(tmp_path / "base")
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    model = adapted(base, tmp_path / "adapter", LoRA(dim=4), DoRA(dim=2))
    assert merge_directory(tmp_path / "adapter", tmp_path / "merged", base, dtype=dtype) == tmp_path / "merged"
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    merged = tmp_path / "merged"
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    companions = {n for n in before if not n.startswith("model") and n != "config.json"}
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= companions
    assert all((merged / name).read_bytes() == before[name] for name in companions)
    config, theirs = (json.loads((place / "config.json").read_text()) for place in (merged, base))
    if dtype != "fp32":
        assert config == theirs
        model.merge_adapters()
        model.export_hf(tmp_path / "exported")
        assert identical(tensors(merged), tensors(tmp_path / "exported"))
    else:  # nothing was rounded: the base is the same in fp32
        other = adapted(base, tmp_path / "again", LoRA(dim=4), DoRA(dim=2), dtype="fp32")
        assert config == {**theirs, "dtype": "float32"}
        other.load_adapters(tmp_path / "adapter")
        other.merge_adapters()
        other.export_hf(tmp_path / "exported")
        assert identical(tensors(merged), tensors(tmp_path / "exported"))
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert "assistant" in AutoTokenizer.from_pretrained(merged).apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_base_s_dtype_stays(dtype: str, tmp_path: Path) -> None:
    """Also fp16, which no model of ours is in."""
    base = make_tiny("llama_tied", tmp_path / "base", dtype=dtype)
    adapted(base, tmp_path / "adapter", LoRA(dim=4), dtype="fp32")
    merge_directory(tmp_path / "adapter", tmp_path / "merged", base)
    model = models.load(base, dtype="fp32")
    model.load_adapters(tmp_path / "adapter")
    model.merge_adapters()
    model.export_hf(tmp_path / "exported")
    wanted = {name: t.to(getattr(torch, dtype)) for name, t in tensors(tmp_path / "exported").items()}
    assert identical(tensors(tmp_path / "merged"), wanted)


def test_tensors_of_the_base_keep_the_bits_they_were_trained_with(tmp_path: Path) -> None:
    """Trained in fp32 on a bf16 base, and merged in fp32: nothing of theirs is rounded."""
    base = make_tiny("llama", tmp_path / "base", dtype="bfloat16")
    model = adapted(base, tmp_path / "adapter", Selective(patterns=["linear_fc2.weight"]), dtype="fp32")
    merge_directory(tmp_path / "adapter", tmp_path / "merged", base, dtype="fp32")
    model.export_hf(tmp_path / "exported")
    assert identical(tensors(tmp_path / "merged"), tensors(tmp_path / "exported"))
    merge_directory(tmp_path / "adapter", tmp_path / "narrow", base)
    wanted = {name: t.bfloat16() for name, t in tensors(tmp_path / "exported").items()}
    assert identical(tensors(tmp_path / "narrow"), wanted)


def test_a_base_of_older_names_with_a_head_beside_the_embedding(tmp_path: Path) -> None:
    """GPT-2's first files leave out a prefix; a tied head may be there twice. transformers loads what is written."""
    base = make_tiny("gpt2", tmp_path / "base")
    held = {name.removeprefix("transformer."): t for name, t in load_file(base / "model.safetensors").items()}
    save_file({**held, "lm_head.weight": held["wte.weight"].clone()}, base / "model.safetensors", {"format": "pt"})
    model = adapted(base, tmp_path / "adapter", LoRA(dim=4))
    merge_directory(tmp_path / "adapter", tmp_path / "merged", base)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        found, wanted = theirs(tokens()).logits, model(tokens())
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert "lm_head.weight" not in tensors(tmp_path / "merged")


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny("llama", tmp_path / "base")
    adapted(base, tmp_path / "adapter", LoRA(dim=4))
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = write.read

    def watched(*given: Any) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = read(*given)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(write, "read", watched)
    merge_directory(tmp_path / "adapter", tmp_path / "merged", base)
    assert len(alive) == 4 * 4 and most <= 1


class Other(LoRA):
    """A method of a user's own, which may compute anything."""


UNMERGEABLE: dict[str, tuple[str, PEFT, str]] = {
    "a bottleneck": ("llama", CanonicalAdapter(dim=4), "a bottleneck is no change of one weight; leave it out of na"),
    "a prompt": ("llama", PromptTuning(init="random"), "virtual tokens are no change of a weight; leave it out"),
    "an encoder": ("llama", PTuning(virtual_tokens=2), "virtual tokens are no change of a weight; leave it out"),
    "keys behind a norm": ("qwen3", IA3(), 'keys behind k_layernorm; train it with key_position="pre_norm"'),
    "an embedding": ("llama", LoRA(dim=4, target_modules=["word_embeddings"]), "stands at word_embeddings, where"),
    "a tied head": ("gpt2", LoRA(dim=4, target_modules=["output_layer"]), "stands at output_layer, whose weight is"),
}


@pytest.mark.parametrize("case", UNMERGEABLE)
def test_what_cannot_be_merged_is_refused_by_name(case: str, tmp_path: Path) -> None:
    family, transform, message = UNMERGEABLE[case]
    base = make_tiny(family, tmp_path / "base")
    adapted(base, tmp_path / "adapter", LoRA("first", dim=2, target_modules=["linear_proj"]), transform)
    there = sorted(tmp_path.iterdir())
    with pytest.raises(MatchError, match=message) as caught:
        merge_directory(tmp_path / "adapter", tmp_path / "merged", base)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{transform} cannot be merged: ")
    assert sorted(tmp_path.iterdir()) == there
    merge_directory(tmp_path / "adapter", tmp_path / "merged", base, names=["first"])


def test_a_method_of_a_user_s_own_is_refused(tmp_path: Path) -> None:
    model = make()
    source = Source("'x'", tmp_path, model.shape, [Other(dim=4)], {}, model.base_identity())
    with pytest.raises(MatchError, match="Other 'lora' cannot be merged: only its own code knows what it does"):
        changes.changes_of(source)


def no_number(base: Path) -> None:
    held = load_file(base / "model.safetensors")
    held["model.norm.weight"][3] = float("inf")
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})


def far(adapter: Path) -> None:
    model = models.load(adapter.parent / "base")
    model.add_adapter(LoRA(dim=4))
    shake(model, 1e30)
    model.save_adapters(adapter, verify=False)  # its proof would refuse it


BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no adapter": ({"adapter": "nowhere"}, None, "There is no adapter directory"),
    "no base": ({"base": None}, None, "belongs to 'base', which is not here; name its checkpoint with base="),
    "no such base": ({"base": "nowhere"}, None, "is no checkpoint directory"),
    "another base": (
        {"base": "other"},
        None,
        "weights differ from this base .other.; .*check_base=False",
    ),
    "another shape": ({"base": "wider"}, None, "was trained on base, another shape: num_layers 4 .here 2."),
    "an unknown name": ({"names": ["lorra"]}, None, "has no adapter 'lorra'; did you mean 'lora'"),
    "another dtype": ({"dtype": "int8"}, None, "dtype is 'int8'; valid: bf16, bfloat16, float32, fp32"),
    "output is the base": ({"output": "base"}, None, "is there already; name a new directory"),
    "output is a file": ({"output": "file"}, None, "is there already; name a new directory"),
    "a value that grows too large": ({}, far, "LoRA 'lora' cannot be merged: .* would hold NaN or Inf"),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with bases and an adapter of the first."""
    root = tmp_path_factory.mktemp("shelf")
    make_tiny("llama", root / "base")
    make_tiny("llama", root / "other", seed=1)
    make_tiny("llama", root / "wider", num_hidden_layers=2)
    adapted(root / "base", root / "adapter", LoRA(dim=4))
    (root / "file").write_text("mine")
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    case: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, change, message = BAD[case]
    root = Path(shutil.copytree(shelf, tmp_path / "shelf"))
    if change is not None:
        change(root / "adapter")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    words = {"adapter": "adapter", "output": "merged", "base": "base"} | given
    paths = {key: value and root / value for key, value in words.items() if key in ("adapter", "output", "base")}
    with pytest.raises(GraftworkError, match=message) as caught:
        merge_directory(**{**words, **paths})
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_a_base_with_no_number_is_refused(shelf: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(shelf / "base", tmp_path / "base"))
    no_number(base)
    with pytest.raises(CheckpointError, match=r"are NaN or infinite in model.norm.weight"):
        merge_directory(shelf / "adapter", tmp_path / "merged", base, check_base=False)
    assert sorted(tmp_path.iterdir()) == [base]


def test_another_base_may_be_taken_all_the_same(shelf: Path, tmp_path: Path) -> None:
    merge_directory(shelf / "adapter", tmp_path / "merged", shelf / "other", check_base=False)
    model = models.load(shelf / "other")
    model.load_adapters(shelf / "adapter", check_base=False)
    model.merge_adapters()
    model.export_hf(tmp_path / "exported")
    assert identical(tensors(tmp_path / "merged"), tensors(tmp_path / "exported"))


def test_random_weights_are_in_no_directory(tmp_path: Path) -> None:
    model = make()
    model.add_adapter(LoRA(dim=4))
    model.save_adapters(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="was trained on random weights, which no directory holds"):
        merge_directory(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.slow
def test_the_pretrained_model(tmp_path: Path) -> None:
    """Without ``base``: the adapter names it."""
    model = models.load("smollm2_135m", dtype="fp32")
    model.add_adapter([CanonicalLoRA(dim=8), DoRA(dim=4)])
    shake(model, 0.01)
    model.eval().save_adapters(tmp_path / "adapter")
    merge_directory(tmp_path / "adapter", tmp_path / "merged", dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found, wanted = theirs(tokens()).logits, model(tokens())
        with model.adapters_disabled():
            assert (model(tokens()) - wanted).abs().max() > 0.05 * wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
