"""Qwen 3, mixtures of experts: Qwen 3's attention, every layer's MLP a mixture, or some layers' only."""

from graftwork.models.weights.hf.family import Config, ShapeFields
from graftwork.models.weights.hf.qwen_moe_like import QwenMoELike


class Qwen3MoE(QwenMoELike):
    """LLaMA's attention with an RMSNorm on each head's query and key, which the config does not mention."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    notes = "mixture of experts in every layer or in some; normed queries and keys"
    aliases = {"num_local_experts": "num_experts"}
    fixed = {**QwenMoELike.fixed, "attention_bias": (None, False)}
    defaults = {
        **QwenMoELike.defaults,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields, norms of queries and keys on."""
        return {**super().read(config), "qk_layernorm": True}
