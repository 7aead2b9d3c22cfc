"""Qwen 2 and 2.5: LLaMA's layers with biases on queries, keys and values."""

from graftwork.models.weights.hf.family import Config, ShapeFields
from graftwork.models.weights.hf.llama_like import LlamaLike


class Qwen2(LlamaLike):
    """LLaMA with qkv biases, which the config does not mention."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    notes = "qkv biases"
    fixed = {**LlamaLike.fixed, "attention_bias": (None, False), "mlp_bias": (None, False)}
    defaults = {**LlamaLike.defaults, "num_key_value_heads": 32, "use_sliding_window": False}

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields, qkv biases on."""
        return {**super().read(config), "add_qkv_bias": True}
