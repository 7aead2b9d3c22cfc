"""GGUF conversion: equal to the Hugging Face original, exact tokenizer, whole or not at all."""

import os
import signal
from multiprocessing import get_context
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from graftwork.data.tokenizer import checkpoint_tokenizer
from graftwork.errors import CheckpointError
from graftwork.models.weights import gguf as conversion
from graftwork.models.weights import read_config, shape_from_hf
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_hf import make_tiny, oracle


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_conversion_gives_back_the_original(family: str, tmp_path: Path) -> None:
    source = make_tiny(family, tmp_path / "hf")
    conversion.convert(write_gguf(tmp_path / "x.gguf", source), tmp_path / "out", torch.float32)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert shape_from_hf(read_config(tmp_path / "out")) == shape_from_hf(read_config(source))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(oracle(source)(tokens).logits, oracle(tmp_path / "out")(tokens).logits)


def test_quantised_tensors_are_dequantised_then_rounded(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "hf", hidden_size=64)
    path = write_gguf(tmp_path / "x.gguf", source, quantised=True)
    conversion.convert(path, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(tensors["blk.0.ffn_up.weight"].data, tensors["blk.0.ffn_up.weight"].tensor_type)
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], torch.from_numpy(expected).bfloat16())


def test_tokenizer(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "hf")
    conversion.convert(write_gguf(tmp_path / "x.gguf", source), tmp_path / "out")
    tokenizer = checkpoint_tokenizer(tmp_path / "out")
    names = tokenizer.convert_ids_to_tokens(tokenizer("abc 00</s>").input_ids)
    # smollm cuts digits one by one; the space belongs to what follows it.
    assert names == ["abc", "Ġ", "0", "0", "</s>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.decode(tokenizer("abc 00").input_ids) == "abc 00"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"


def test_llama3_splitter_keeps_numbers_of_three_digits(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "hf")
    conversion.convert(write_gguf(tmp_path / "x.gguf", source, splitter="llama-bpe"), tmp_path / "out")
    tokenizer = checkpoint_tokenizer(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc0000").input_ids) == ["abc", "00", "0", "0"]


def test_llama3_frequency_scaling_is_read(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "hf")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(source, rope_parameters=scaling), "cpu")
    factors = (10000.0 ** -(np.arange(0, 12, 2) / 12) / frequencies.numpy()).astype(np.float32)

    def write(name: str, divisors: np.ndarray) -> Path:
        return write_gguf(tmp_path / name, source, change=lambda w: w.add_tensor("rope_freqs.weight", divisors))

    conversion.convert(write("x.gguf", factors), tmp_path / "out")
    assert shape_from_hf(read_config(tmp_path / "out")).rope_scaling_factor == 8.0
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight of the GGUF file does not scale the frequencies"):
        conversion.convert(write("y.gguf", np.sqrt(factors) * 2), tmp_path / "other")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "mamba"}, "GGUF architecture 'mamba' is not supported; valid: 'llama'"),
        ({"tokenizer": "llama"}, "GGUF tokenizer 'llama' is not supported; valid: 'gpt2'"),
        ({"splitter": "smolm"}, "GGUF pre-tokenizer 'smolm' is not supported; did you mean 'smollm'"),
        ({"skip": "model.layers.1.mlp.up_proj.weight"}, "lacks the tensors blk.1.ffn_up.weight"),
    ],
)
def test_unsupported_files_are_one_sentence_and_leave_nothing(options: dict, message: str, tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "hf")
    path = write_gguf(tmp_path / "x.gguf", source, **options)
    with pytest.raises(CheckpointError, match=message):
        conversion.convert(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "x.gguf"]


@pytest.mark.parametrize("size", [0, 100, 5000, -1000])
def test_truncated_files_are_one_sentence(size: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", make_tiny("llama", tmp_path / "hf"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="is no readable GGUF file") as caught:
        conversion.convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def _die_while_converting(path: Path, target: Path) -> None:
    conversion.unpermuted = lambda weight, heads: os.kill(os.getpid(), signal.SIGKILL)
    conversion.convert(path, target)


def test_killed_conversion_is_never_seen_and_can_be_repeated(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", make_tiny("llama", tmp_path / "hf"))
    process = get_context("spawn").Process(target=_die_while_converting, args=(path, tmp_path / "out"))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    conversion.convert(path, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
