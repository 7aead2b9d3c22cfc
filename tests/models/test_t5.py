"""T5 and mT5 against transformers: logits, padding on either side, export, cache, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftwork import models
from graftwork.core.t5 import DecoderCache
from graftwork.errors import CheckpointError, ConfigError, ParallelismError
from graftwork.models import GPT, T5, shapes
from graftwork.models.weights import read_config, shape_from_hf
from tests.helpers.tiny_t5 import KINDS, VOCABULARY, ids, make_t5, masks, oracle, shape, tiny

TOLERANCE = 5e-5
"""Largest difference of logits, relative to their largest absolute value."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def logits_of(directory: Path, left: bool = False) -> Tensor:
    """Return transformers' logits, zero at padding."""
    (source, target), (source_mask, target_mask) = ids(), masks(left)
    with torch.no_grad():
        found = oracle(directory)(
            input_ids=source,
            attention_mask=source_mask,
            decoder_input_ids=target,
            decoder_attention_mask=target_mask,
        )
    logits: Tensor = found.logits * target_mask.unsqueeze(-1)
    return logits


def ours_of(model: models.Model, left: bool = False) -> Tensor:
    (source, target), (source_mask, target_mask) = ids(), masks(left)
    with torch.no_grad():
        return model.eval()(source, target, source_mask, target_mask)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind: str, left: bool, tmp_path: Path) -> None:
    directory = make_t5(kind, tmp_path / "hf")
    model, theirs = models.load(directory), logits_of(directory, left)
    assert isinstance(model, T5)
    assert difference(ours_of(model, left), theirs) < TOLERANCE
    # The comparison would notice one changed weight, and a source read to its end although it is padded there.
    with torch.no_grad():
        model.chunks[0].decoder.layers[2].cross_attention.linear_kv.weight[0, 0] += 0.5
    assert difference(ours_of(model, left), theirs) > 2 * TOLERANCE
    (source, target), (_, target_mask) = ids(), masks(left)
    with torch.no_grad():
        assert difference(model(source, target, None, target_mask), theirs) > 100 * TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_random_configurations_equal_transformers(seed: int, tmp_path: Path) -> None:
    def draw(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    generator = torch.Generator().manual_seed(seed)
    fields = {
        "vocab_size": draw(41, 97, 101),
        "d_model": draw(24, 36, 48),
        "d_kv": draw(4, 6, 16),
        "d_ff": draw(30, 64),
        "num_heads": draw(2, 3, 4),
        "num_layers": draw(1, 2, 3),
        "num_decoder_layers": draw(1, 2, 3),
        "relative_attention_num_buckets": draw(8, 9, 32),
        "relative_attention_max_distance": draw(20, 128),
        "layer_norm_epsilon": draw(1e-6, 1e-2),
        "feed_forward_proj": draw("relu", "gated-gelu", "gated-silu", "gelu", "gelu_new"),
    }
    directory = make_t5(draw(*KINDS), tmp_path / "hf", seed, **fields)
    source, target = (torch.randint(1, 41, (2, length), generator=generator) for length in (70, 50))
    with torch.no_grad():
        theirs = oracle(directory)(input_ids=source, decoder_input_ids=target).logits
        assert difference(models.load(directory).eval()(source, target), theirs) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_is_the_inverse_of_load(kind: str, dtype: str, tmp_path: Path) -> None:
    directory = make_t5(kind, tmp_path / "hf", dtype=dtype)
    model = models.load(directory)
    model.export_hf(tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert shape_from_hf(read_config(tmp_path / "out")) == model.shape
    assert torch.equal(logits_of(directory), logits_of(tmp_path / "out"))
    assert model.shape.total_parameters() == sum(p.numel() for p in model.parameters())


def test_the_first_checkpoints_repeat_embeddings_and_hold_an_idle_table(tmp_path: Path) -> None:
    directory = make_t5("t5", tmp_path / "hf")
    wanted = ours_of(models.load(directory))
    idle = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

    def old(tensors: dict[str, Tensor]) -> None:
        for stack in ("encoder", "decoder"):
            tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors |= {idle: torch.randn(32, 4), "lm_head.weight": tensors["shared.weight"].clone()}

    make_t5("t5", directory, change=old)
    assert torch.equal(ours_of(models.load(directory)), wanted)


def test_a_head_of_its_own_where_the_config_ties_it_is_refused(tmp_path: Path) -> None:
    # transformers since version 5 writes this for T5 1.1, whatever the head is.
    directory = make_t5("t5v11", tmp_path / "hf")
    config = read_config(directory)
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings must be false"):
        models.load(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_computes_what_whole_rows_give(kind: str) -> None:
    model = tiny(kind).eval()
    (source, target), (source_mask, _) = ids(), masks()
    lengths = source_mask.sum(1)
    with torch.no_grad():
        whole = model(source, target, source_mask)
        with DecoderCache(model.chunks[0], source, lengths, target.shape[1]) as cache:
            steps = [cache.read(target[:, :4]), *(cache.read(target[:, [i]]) for i in range(4, 9))]
            for logits, place in zip(steps, range(3, 9)):
                assert difference(logits[:, :VOCABULARY], whole[:, place]) < 1e-5
            # Other rows, in another order, one of them twice.
            rows = [2, 0, 2]
            cache.keep(rows)
            for place in range(9, 12):
                assert difference(cache.read(target[rows][:, [place]])[:, :VOCABULARY], whole[rows, place]) < 1e-5
        assert torch.equal(model(source, target, source_mask), whole), "outside of the block nothing is remembered"


def test_the_cache_would_show_a_bias_that_counts_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliberate break."""
    model = tiny("t5v11").eval()
    (source, target), (source_mask, _) = ids(), masks()
    decode = type(model.chunks[0]).decode
    with torch.no_grad():
        whole = model(source, target, source_mask)
        with DecoderCache(model.chunks[0], source, source_mask.sum(1), 12) as cache:
            cache.read(target[:, :4])
            monkeypatch.setattr("graftwork.core.t5._biases", _from_zero)
            assert difference(cache.read(target[:, [4]])[:, :VOCABULARY], whole[:, 4]) > 1e-4
    assert decode is type(model.chunks[0]).decode


def _from_zero(table: Any, queries: Tensor, keys: Tensor) -> Tensor:
    places = torch.arange(len(queries))
    weight = table.relative_attention_bias.weight
    buckets = table._relative_position_bucket(keys - places[:, None], table.bidirectional)
    return torch.nn.functional.embedding(buckets, weight).permute(2, 0, 1).unsqueeze(0)


def test_a_batch_is_laid_out_for_encoder_and_decoder() -> None:
    model = tiny("t5").eval()
    batch = model.lay_out([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], torch.device("cpu"))
    assert batch.source is not None and batch.source_lengths is not None
    assert batch.source.tolist() == [[5, 6, 7], [8, 0, 0]] and batch.source_lengths.tolist() == [3, 1]
    assert batch.tokens.tolist()[1] == [0, 11, 12] and batch.labels.tolist()[1] == [11, 12, 13]
    output, loss_function = model.forward_step(iter([batch]), model.chunks[0])
    total, count, _ = loss_function(output)
    mask = torch.arange(3) < batch.source_lengths[:, None]
    logits = model(batch.source, batch.tokens, mask.long())
    dense = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="sum")
    assert count == 5 and torch.allclose(total, dense, rtol=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2 cannot divide an encoder-decoder"),
        ({"context_parallel_size": 2}, "context_parallel_size=2 cannot divide an encoder-decoder; 1 is valid"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "pipeline_model_parallel_size=2 cannot divide",
        ),
        (
            {"tensor_model_parallel_size": 3},
            r"tensor_model_parallel_size=3 does not fit this model; valid: \[1, 2, 4\]",
        ),
    ],
)
def test_layouts_that_divide_layers_or_sequences_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ParallelismError, match=message):
        shape("t5").transformer_config(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"add_bias_linear": True}, "T5Shape.add_bias_linear is True; valid: False"),
        ({"num_moe_experts": 4}, "T5Shape.num_moe_experts is 4; valid: None"),
        ({"num_query_groups": 2}, "num_query_groups is 2; num_attention_heads=4 is valid"),
        ({"position_embedding": "rope"}, "Shape.position_embedding is 'rope'; .*'?relative'?"),
        ({"activation": "squared_relu"}, "Shape.activation is 'squared_relu'; "),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets is 2; a whole number of at least 4"),
        ({"relative_attention_max_distance": 16}, "max_distance is 16; with 32 buckets a whole number of at least 17"),
        ({"decoder_start_token_id": 101}, "decoder_start_token_id is 101; a token id up to 100 is valid"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id is -1; a whole number of at least 0 is valid"),
        ({"scale_output": 1}, "scale_output is 1; True, False or None is valid"),
    ],
)
def test_shapes_that_no_t5_has_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        shape("t5", **fields)
    assert "\n" not in str(caught.value)


def test_a_kind_wants_its_own_shape() -> None:
    with pytest.raises(ConfigError, match="a model of kind 'gpt' cannot be a t5, which is of kind 't5'"):
        GPT(shape("t5"))
    with pytest.raises(ConfigError, match="a model of kind 't5' cannot be a llama, which is of kind 'gpt'"):
        T5(shapes.llama2_7b())
    with pytest.raises(ConfigError, match="a t5 has a T5Shape, not a Shape"):
        T5(shapes.llama2_7b(family="t5"))


def test_batches_that_no_encoder_decoder_reads_are_refused() -> None:
    model = tiny("t5")
    batch = model.lay_out([[5, 6]], [[7]], torch.device("cpu"))
    with pytest.raises(ConfigError, match="needs a batch with a source: lay it out with model.lay_out"):
        model.run_chunk(model.chunks[0], replace(batch, source=None))
    with pytest.raises(ConfigError, match="cannot be packed: set data.packing=False"):
        model.run_chunk(model.chunks[0], replace(batch, cu_seqlens=torch.tensor([[0, 1]], dtype=torch.int32)))
