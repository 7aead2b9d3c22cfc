"""Which modules a config names, and which rank: as Hugging Face PEFT's own functions say."""

import json
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from graftwork.models.exchange.fields import KNOWN, Fields, value_of
from graftwork.models.exchange.places import Places, shortest
from tests.contracts.methods import FAMILIES, shape
from tests.helpers import tiny_t5

SHAPES = {
    **{family: shape(family, num_layers=12) for family in FAMILIES},
    "t5": tiny_t5.shape("t5", num_layers=12, num_decoder_layers=11),
}
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj", "q", "v", "c_attn"]},
    {"target_modules": ["proj", "c_proj", "wo", "o"]},
    {
        "target_modules": [
            "1.mlp.down_proj",
            "h.1.mlp.c_proj",
            "block.1.layer.0.SelfAttention.k",
            "model.layers.2.mlp.up_proj",
        ]
    },
    {"target_modules": ["down_proj", "c_proj", "wo", "lm_head"], "exclude_modules": ["1.mlp.down_proj", "attn.c_proj"]},
    {"target_modules": ["q_proj", "c_attn", "k", "lm_head", "wte"], "layers_to_transform": [1, 10]},
    {"target_modules": ["q_proj", "c_attn", "k"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn", "k"], "layers_to_transform": [1], "layers_pattern": ["h", "block"]},
    {"target_modules": ["model.layers.0.mlp.up_proj", "up_proj", "wi"], "layers_to_transform": [3]},
]
"""Of any family: what a model does not have, it does not have on either side."""


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("family", SHAPES)
def test_targets(family: str, config: dict[str, Any]) -> None:
    modules = list(Places(SHAPES[family]).modules)
    theirs = peft.LoraConfig(**config)
    wanted = {m for m in modules if check_target_module_exists(theirs, m) and not _excluded(theirs, m)}
    assert Fields({"peft_type": "LORA", **config}, "here").targeted(modules) == wanted


def _excluded(config: peft.LoraConfig, module: str) -> bool:
    return type(check_target_module_exists(config, module)).__name__ == "_ExcludedModule"


@pytest.mark.parametrize("family", SHAPES)
def test_patterns(family: str) -> None:
    patterns = {
        "layers.1.mlp.down_proj": 2,
        "q_proj": 3,
        "h.1.attn.c_proj": 4,
        "c_proj": 5,
        "1.layer.0.SelfAttention.q": 6,
    }
    for module in Places(SHAPES[family]).modules:
        key = get_pattern_key(list(patterns), module)
        assert value_of(patterns, module, 8) == patterns.get(key, 8), module


@pytest.mark.parametrize("family", SHAPES)
def test_the_shortest_names_mean_what_they_are_for(family: str) -> None:
    modules = list(Places(SHAPES[family]).modules)
    for chosen in (modules[::2], modules[:3], modules[5:6], modules):
        names = shortest(chosen, modules)
        theirs = peft.LoraConfig(target_modules=names)
        assert {m for m in modules if check_target_module_exists(theirs, m)} == set(chosen)


@pytest.mark.parametrize(
    "made",
    [peft.LoraConfig(), peft.IA3Config(), peft.PromptTuningConfig(num_virtual_tokens=1), peft.PromptEncoderConfig()],
    ids=lambda made: str(made.peft_type.value),
)
def test_every_field_of_a_plain_config_is_fine(made: peft.PeftConfig) -> None:
    """A version of PEFT whose plain adapters have a new field that is set would be refused: this test would tell."""
    saved = json.loads(json.dumps(made.to_dict(), default=list))
    assert Fields(saved, "here").kind in KNOWN
