"""Qwen 1.5 and 2, mixtures of experts: Qwen 2's attention, and an expert that sees every token."""

from graftwork.models.shape import Shape
from graftwork.models.weights.hf import rules
from graftwork.models.weights.hf.family import Config, ShapeFields, flag
from graftwork.models.weights.hf.mixture_like import whole
from graftwork.models.weights.hf.qwen_moe_like import QwenMoELike
from graftwork.models.weights.mapping import Rule


class Qwen2MoE(QwenMoELike):
    """LLaMA's attention with qkv biases; beside the routed experts one for all tokens, weighted by a sigmoid."""

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    notes = "mixture of experts and a gated shared expert, in every layer or in some; qkv biases"
    used = QwenMoELike.used | {"qkv_bias", "shared_expert_intermediate_size"}
    fixed = {**QwenMoELike.fixed, "attention_bias": (None, False)}
    defaults = {
        **QwenMoELike.defaults,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    }

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields, the shared expert's too."""
        return {
            **super().read(config),
            "add_qkv_bias": flag(config, "qkv_bias", True),
            "moe_shared_expert_intermediate_size": whole(config, "shared_expert_intermediate_size"),
            "moe_shared_expert_gate": True,
        }

    def write(self, shape: Shape) -> Config:
        """Return the config fields."""
        return {
            **super().write(shape),
            "qkv_bias": shape.add_qkv_bias,
            "shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
        }

    def routed(self, shape: Shape, layer: str, norm: str) -> tuple[Rule, ...]:
        """Return the rules of a mixture, the shared expert's after the others'."""
        shared = (f"{layer}mlp.shared_expert.{linear}." for linear in self.linears)
        return (
            *super().routed(shape, layer, norm),
            *rules.shared_expert(shape, layer + "mlp.shared_expert_gate.", *shared),
        )
