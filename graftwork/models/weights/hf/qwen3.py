"""Qwen 3, dense: LLaMA's layers with normed queries and keys."""

from graftwork.models.weights.hf.family import Config, ShapeFields
from graftwork.models.weights.hf.llama_like import LlamaLike


class Qwen3(LlamaLike):
    """LLaMA with an RMSNorm on each head's query and key, which the config does not mention."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    notes = "normed queries and keys"
    defaults = {**LlamaLike.defaults, "num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False}

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields, norms of queries and keys on."""
        return {**super().read(config), "qk_layernorm": True}
