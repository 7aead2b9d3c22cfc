"""Nemotron-3 and Nemotron-4: LLaMA's tensor names, LayerNorm around zero, squared ReLU."""

from graftwork.models.shape import Shape
from graftwork.models.weights.hf.family import Config, ShapeFields, number
from graftwork.models.weights.hf.llama_like import (
    FIXED,
    USED,
    LlamaLike,
    linear_bias,
    read_sizes,
    write_linear_bias,
    write_sizes,
)
from graftwork.models.weights.hf.rope import read_rope, write_rope

ROTATED = 0.5
"""Part of each head that is rotated when the config says nothing."""


class Nemotron(LlamaLike):
    """LayerNorm whose weights are stored minus one, no gate, rotary positions on half of each head."""

    name = "nemotron"
    architecture = "NemotronForCausalLM"
    notes = "squared ReLU, zero-centred LayerNorm, rotary positions on half of each head"
    used = USED | {"norm_eps"}
    fixed = {"hidden_act": ("relu2",), **FIXED}
    defaults = {"hidden_act": "relu2", "norm_eps": 1e-5}

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields."""
        return {
            **read_sizes(config),
            **read_rope(config, ROTATED),
            "normalization": "LayerNorm",
            "layernorm_zero_centered_gamma": True,
            "layernorm_epsilon": number(config, "norm_eps"),
            "activation": "squared_relu",
            "add_bias_linear": linear_bias(config),
        }

    def write(self, shape: Shape) -> Config:
        """Return the config fields, the rotated part and biases said aloud."""
        return {
            **write_sizes(shape),
            "hidden_act": "relu2",
            "norm_eps": shape.layernorm_epsilon,
            **write_linear_bias(shape),
            **write_rope(shape, ROTATED),
        }
