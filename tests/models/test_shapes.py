"""Shapes: published sizes, arithmetic against real modules, overrides, and what is refused."""

import inspect

import fiddle as fdl
import nemo_run as run
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graftwork.errors import ConfigError, ParallelismError
from graftwork.models import shapes
from graftwork.models.shapes import Shape
from graftwork.models.weights import hf_config

PUBLISHED = {
    "smollm2_135m": 134515008,
    "gpt2_124m": 124439808,
    "llama2_7b": 6738415616,
    "llama2_13b": 13015864320,
    "llama2_70b": 68976648192,
    "llama3_8b": 8030261248,
    "llama3_70b": 70553706496,
    "llama31_8b": 8030261248,
    "llama32_1b": 1235814400,
    "llama32_3b": 3212749824,
    "mistral_7b": 7248023552,
    "qwen2_5_7b": 7615616512,
    "qwen3_0_6b": 596049920,
    "qwen3_8b": 8190735360,
    "mixtral_8x7b": 46702792704,
    "qwen3_30b_a3b": 30532122624,
}
ROUNDED = {"gpt3_175b": 175e9, "minitron_4b": 4.19e9, "nemotron3_8b": 8.5e9, "nemotron4_340b": 340e9}
WIDE = ("qwen3_0_6b", "qwen3_30b_a3b")
"""Those whose heads have twice the channels of the hidden size."""
ALL = [*PUBLISHED, *ROUNDED]


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_is_the_published_one(name: str) -> None:
    assert getattr(shapes, name)().total_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_total_rounds_to_the_published_one(name: str) -> None:
    assert getattr(shapes, name)().total_parameters() == pytest.approx(ROUNDED[name], rel=0.006)


@pytest.mark.parametrize("name", ALL)
def test_total_equals_transformers_on_the_meta_device(name: str) -> None:
    shape = getattr(shapes, name)(num_layers=2)
    settings = hf_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    assert shape.total_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_megatron_config(name: str) -> None:
    shape = getattr(shapes, name)()
    config = shape.transformer_config(params_dtype=torch.bfloat16)
    assert config.bf16 and config.pipeline_dtype == torch.bfloat16 and config.calculate_per_token_loss
    assert config.kv_channels * config.num_attention_heads == shape.hidden_size * (2 if name in WIDE else 1)
    assert config.gated_linear_unit == (shape.family not in ("gpt2", "nemotron"))


def test_moe_counts_every_expert() -> None:
    dense = shapes.llama2_7b(num_layers=1)
    moe = shapes.llama2_7b(num_layers=1, num_moe_experts=4)
    expert = 3 * 4096 * 11008
    assert moe.total_parameters() - dense.total_parameters() == 3 * expert + 4 * 4096
    assert moe.transformer_config().moe_router_topk == 2


@pytest.mark.parametrize("vocab, tensor, multiple, padded", [(101, 1, 1, 101), (101, 2, 1, 102), (101, 2, 64, 128)])
def test_padded_vocabulary(vocab: int, tensor: int, multiple: int, padded: int) -> None:
    assert shapes.llama2_7b(vocab_size=vocab).padded_vocab_size(tensor, multiple) == padded


def test_override_moves_what_follows_from_it() -> None:
    shape = shapes.llama2_7b(hidden_size=1024, num_attention_heads=16)
    assert (shape.kv_channels, shape.num_query_groups) == (64, 16)


def test_signature_shows_every_field_with_its_published_value() -> None:
    parameters = inspect.signature(shapes.llama3_8b).parameters
    assert parameters["rotary_base"].default == 500000.0
    assert parameters["kv_channels"].default is None
    shape = shapes.llama3_8b(**{name: p.default for name, p in parameters.items()})
    assert shape == shapes.llama3_8b()


def test_shape_function_is_a_recipe_leaf() -> None:
    leaf = run.Config(shapes.llama2_7b, num_layers=2)
    assert leaf.hidden_size == 4096
    with pytest.raises((AttributeError, TypeError), match="num_layerz"):
        leaf.num_layerz = 3
    assert fdl.build(leaf) == shapes.llama2_7b(num_layers=2)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"num_layer": 2}, "no field 'num_layer'; did you mean 'num_layers'"),
        ({"family": "lama"}, "Shape.family is 'lama'; did you mean 'llama'"),
        ({"activation": "relu"}, "Shape.activation is 'relu'; did you mean .*'squared_relu'"),
        ({"num_layers": 0}, "Shape.num_layers is 0; a whole number of at least 1 is valid"),
        ({"num_query_groups": 5}, "num_query_groups=5 must divide num_attention_heads=32"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide hidden_size=4096"),
    ],
)
def test_bad_values_are_one_sentence(overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        shapes.llama2_7b(**overrides)
    assert "\n" not in str(caught.value)


def test_parallel_sizes_that_do_not_fit() -> None:
    shape = shapes.smollm2_135m()
    with pytest.raises(ParallelismError, match=r"model_parallel_size=2 does not fit this model; valid: \[1, 3\]"):
        shape.transformer_config(tensor_model_parallel_size=2)
    with pytest.raises(ParallelismError, match="4 pipeline stages do not divide the 30 layers"):
        shape.transformer_config(pipeline_model_parallel_size=4)
    with pytest.raises(ConfigError, match="no field 'sequence_paralel'; did you mean 'sequence_parallel'"):
        shape.transformer_config(sequence_paralel=True)


def test_shape_is_frozen_and_comparable() -> None:
    assert shapes.llama2_7b() == shapes.llama2_7b() != shapes.llama2_13b()
    assert isinstance(shapes.gpt3_175b(), Shape)
