"""Damaged GGUF files: one short sentence, or exactly what an independent reader finds in them.

Half of the mutations touch the header alone, where counts, lengths, names and types stand.
"""

import json
import os
import random
import resource
import shutil
import struct
import time
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from graftwork.errors import CheckpointError
from graftwork.models.weights.gguf import convert
from tests.fuzz.mutations import Mutation, draw, mutate
from tests.helpers.tiny_gguf import llama_cpp_name, permuted, write_gguf
from tests.helpers.tiny_hf import make_tiny

SECONDS, KIBIBYTES, CHARACTERS = 5.0, 300_000, 500
PAST = [(629, "bytes.noise#89")]
HUGE = [0, 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]
NUMBERS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("whole")
    source = make_tiny("llama", root / "hf", num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    return write_gguf(root / "x.gguf", source, quantised=True).read_bytes()


def damaged(whole: bytes, number: int, mutation: Mutation) -> bytes:
    """Damage the whole file, its header, or one number of its header, in turn."""
    header = gguf_header_size(whole)
    if number % 3 == 0:
        return mutate(whole, mutation)
    if number % 3 == 1:
        return mutate(whole[:header], mutation) + whole[header:]
    rng = random.Random(str(mutation))
    at, kind = rng.randrange(4, header - 8), rng.choice(["<I", "<Q"])
    value = struct.pack(kind, rng.choice(HUGE) % 2 ** (8 * struct.calcsize(kind)))
    return whole[:at] + value + whole[at + len(value) :]


def gguf_header_size(whole: bytes) -> int:
    """Where the first tensor's numbers begin: the end of the last tensor's entry."""
    return max(whole.rfind(b".weight") + 40, 64)


def check_same(path: Path, out: Path) -> None:
    """Compare what was written with what gguf's own reader finds."""
    reader = gguf.GGUFReader(path)
    config, stored = json.loads((out / "config.json").read_text()), {t.name: t for t in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for theirs, ours in NUMBERS.items():
        assert config[ours] == fields[f"llama.{theirs}"], ours
    assert config["rms_norm_eps"] == pytest.approx(fields["llama.attention.layer_norm_rms_epsilon"], rel=1e-5)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(out / "model.safetensors").items():
        wanted, part = stored[llama_cpp_name(name)], name.split(".")[-2]
        found = permuted(tensor.numpy(), heads[part]) if part in heads else tensor.numpy()
        with np.errstate(all="ignore"):
            values = gguf.dequantize(wanted.data, wanted.tensor_type).reshape(found.shape)
        assert np.array_equal(found, values, equal_nan=True), name
    vocabulary = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary, key=vocabulary.__getitem__) == fields["tokenizer.ggml.tokens"]


def outcome(data: bytes, whole: bytes, place: Path) -> str:
    path, out = place / "x.gguf", place / "out"
    path.write_bytes(data)
    try:
        convert(path, out, torch.float32)
    except CheckpointError as error:
        text = str(error)
        assert "\n" not in text and 10 < len(text) < CHARACTERS, text[:1000]
        assert os.listdir(place) == ["x.gguf"], "a refused file leaves nothing"
        return "refused"
    check_same(path, out)
    shutil.rmtree(out)
    return "equal" if data == whole else "other"


def fuzz(mutations: list[Mutation], whole: bytes, place: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, mutation in enumerate(mutations):
        started = time.process_time()
        try:
            found[outcome(damaged(whole, number, mutation), whole, place)] += 1
        except Exception as error:
            raise AssertionError(f"{number}, {mutation}: {type(error).__name__}: {str(error)[:300]}") from error
        assert time.process_time() - started < SECONDS, f"{number}, {mutation} took too long"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < KIBIBYTES, f"{number}, {mutation}"
    print(f"GGUF: {dict(found)}")
    return found


def test_a_whole_file_is_equal(whole: bytes, tmp_path: Path) -> None:
    assert outcome(whole, whole, tmp_path) == "equal"


def test_three_hundred_mutations(whole: bytes, tmp_path: Path) -> None:
    found = fuzz(draw(300, ("bytes",)), whole, tmp_path)
    assert found["refused"] > 100 and found["other"] > 20


@pytest.mark.slow
def test_five_thousand_mutations(whole: bytes, tmp_path: Path) -> None:
    found = fuzz(draw(5000, ("bytes",)), whole, tmp_path)
    assert found["refused"] > 1500 and found["other"] > 300


def _changed(kind: str) -> bytes:
    """A small file with one thing wrong."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = struct.pack("<Q", 5) + b"a.key"
    vast = struct.pack("<I", 4) + struct.pack("<4Q", *[2**50] * 4) + struct.pack("<IQ", 0, 0)
    return {
        "a list without end": head + key + struct.pack("<IIQ", 9, 4, 2**60),
        "a list of lists": head + key + struct.pack("<IIQ", 9, 9, 1) * 5000,
        "a text without end": head + key + struct.pack("<IQ", 8, 2**62),
        "more settings than bytes": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
        "more tensors than bytes": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
        "an unknown type": head + key + struct.pack("<I", 77),
        "a name that is no text": head + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1),
        "a tensor of 2**200 numbers": b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + vast,
        "four million bytes as a list": head + key + struct.pack("<IIQ", 9, 0, 2**22 + 1) + bytes(2**22 + 1),
        "empty": b"",
        "a version of the future": b"GGUF" + struct.pack("<IQQ", 4, 0, 0),
    }[kind]  # fmt: skip


FINDINGS = {
    "a list without end": "claims lists of",
    "a list of lists": "unknown type 9",
    "a text without end": "claims a text of",
    "more settings than bytes": "settings and 0 tensors",
    "more tensors than bytes": "0 settings and",
    "an unknown type": "unknown type 77",
    "a name that is no text": "is not UTF-8 text",
    "a tensor of 2**200 numbers": "ends before its tensors do",
    "four million bytes as a list": "claims lists of",
    "empty": "ends within its header",
    "a version of the future": "version 4",
}


@pytest.mark.parametrize("kind", FINDINGS)
def test_what_the_library_takes_as_it_comes(kind: str, tmp_path: Path) -> None:
    """The first one has gguf's reader build a list until the memory is full."""
    (tmp_path / "x.gguf").write_bytes(_changed(kind))
    started = time.process_time()
    with pytest.raises(CheckpointError, match=FINDINGS[kind]):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    assert time.process_time() - started < SECONDS


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        convert(tmp_path / "x.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_token_merges(["a b", "ab"]), "the merge 'ab' is not of two tokens"),
        (lambda w: w.add_token_merges(["a zz"]), "the merge 'a zz' is not of two tokens"),
        (lambda w: w.add_token_list(["a", "a"]), "a token is empty or stands there twice"),
        (lambda w: w.add_token_list(["a", ""]), "a token is empty or stands there twice"),
        (lambda w: w.add_token_types([1]), "tokens and 1 types"),
        (lambda w: w.add_bos_token_id(99), "the bos token is 99, its tokens are 0 to"),
        (lambda w: w.add_string("tokenizer.ggml.bos_token_id", "x"), "does not fit: 'tokenizer.ggml.bos_token_id'"),
        (lambda w: w.add_uint32("tokenizer.ggml.pre", 1), "does not fit: 'tokenizer.ggml.pre'"),
        (lambda w: w.add_string("tokenizer.ggml.tokens", "x"), "does not fit: 'tokenizer.ggml.tokens'"),
        (lambda w: w.add_string("llama.block_count", "x"), "describes no valid model"),
        (lambda w: w.add_string("llama.rope.freq_base", "x" * 10_000), "describes no valid model"),
        (
            lambda w: w.add_string("mlama.rope.freq_base", "x"),
            "the setting 'mlama.rope.freq_base' of a GGUF file is unknown",
        ),
        (lambda w: w.add_string("general.architecture", "x" * 10_000), "architecture 'xxx"),
    ],
)
def test_settings_that_do_not_fit(change, words: str, tmp_path: Path) -> None:
    def replace(writer: gguf.GGUFWriter) -> None:
        before = dict(writer.kv_data[0])
        writer.kv_data[0].clear()
        change(writer)
        writer.kv_data[0].update({**before, **writer.kv_data[0]})

    source = make_tiny("llama", tmp_path / "hf", num_hidden_layers=1)
    path = write_gguf(tmp_path / "x.gguf", source, change=replace)
    with pytest.raises(CheckpointError, match=words) as refused:
        convert(path, tmp_path / "out")
    assert len(str(refused.value)) < CHARACTERS and not (tmp_path / "out").exists()


def test_past_findings(whole: bytes, tmp_path: Path) -> None:
    """The name of a setting was damaged, and its default taken."""
    found = Counter(outcome(damaged(whole, at, Mutation.parse(text)), whole, tmp_path) for at, text in PAST)
    assert found["refused"] == len(PAST), found
