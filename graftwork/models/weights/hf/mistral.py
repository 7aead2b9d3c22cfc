"""Mistral: LLaMA's layers, with a sliding window that must not be in effect."""

from graftwork.models.shape import Shape
from graftwork.models.weights.hf.family import Config
from graftwork.models.weights.hf.llama_like import LlamaLike


class Mistral(LlamaLike):
    """LLaMA without biases; transformers' default of a sliding window is switched off in what is written."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    notes = "without a sliding window that is in effect"
    fixed = {**LlamaLike.fixed, "attention_bias": (None, False), "mlp_bias": (None, False)}
    defaults = {**LlamaLike.defaults, "num_key_value_heads": 8, "sliding_window": 4096}

    def write(self, shape: Shape) -> Config:
        """Return the config fields with the sliding window off."""
        return {**super().write(shape), "sliding_window": None}
