"""T5's published shapes: parameter counts, and what transformers makes of their configs on the meta device."""

import inspect

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from graftwork.errors import ConfigError
from graftwork.models import shapes
from graftwork.models.shapes import T5Shape
from graftwork.models.weights import hf_config, shape_from_hf

PUBLISHED = {
    "t5_small": 60506624,
    "t5_base": 222903552,
    "t5_large": 737668096,
    "t5_3b": 2851598336,
    "t5_11b": 11307321344,
    "t5v11_small": 76961152,
    "t5v11_base": 247577856,
    "t5v11_large": 783150080,
    "t5v11_xl": 2849757184,
    "t5v11_xxl": 11135332352,
    "mt5_small": 300176768,
    "mt5_base": 582401280,
    "mt5_large": 1229581312,
    "mt5_xl": 3742619648,
    "mt5_xxl": 12921057280,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_is_the_published_one_and_transformers(name: str) -> None:
    shape = getattr(shapes, name)()
    assert shape.total_parameters() == PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**hf_config(shape)))
    # transformers makes tied models only; the published untied ones have the head beside the embeddings.
    head = 0 if shape.tie_embeddings else model.lm_head.weight.numel()
    assert sum(p.numel() for p in model.parameters()) + head == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_survive_both_directions(name: str) -> None:
    shape = getattr(shapes, name)()
    assert shape_from_hf(hf_config(shape)) == shape
    parameters = inspect.signature(getattr(shapes, name)).parameters
    assert getattr(shapes, name)(**{n: p.default for n, p in parameters.items()}) == shape


def test_overrides_move_what_follows_from_them() -> None:
    shape = shapes.t5_small(num_layers=2, hidden_size=256, tie_embeddings=False)
    assert isinstance(shape, T5Shape)
    assert (shape.num_decoder_layers, shape.kv_channels, shape.scale_output) == (2, 32, False)
    assert shapes.t5v11_small(hidden_size=256).kv_channels == 64
    with pytest.raises(
        ConfigError, match="T5Shape has no field 'num_decoder_layer'; did you mean 'num_decoder_layers'"
    ):
        shapes.t5_small(num_decoder_layer=2)
