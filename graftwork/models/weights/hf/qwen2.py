"""Qwen 2 and 2.5: LLaMA's layers with biases on queries, keys and values."""

from graftwork.models.weights.hf.family import Config, ShapeFields
from graftwork.models.weights.hf.llama_like import LlamaLike


class Qwen2(LlamaLike):
    """LLaMA with qkv biases, which the config does not mention."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    notes = "qkv biases"

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields, qkv biases on."""
        return {**super().read(config), "add_qkv_bias": True}
