"""Phi-3 and Phi-4: LLaMA's layers, their projections fused on disk."""

from graftwork.models.shape import Shape
from graftwork.models.weights.hf import rules
from graftwork.models.weights.hf.llama_like import LlamaLike
from graftwork.models.weights.mapping import Rule


class Phi3(LlamaLike):
    """One tensor for all queries, then keys, then values, one for gate, then up; rotary positions on part of a head."""

    name = "phi3"
    architecture = "Phi3ForCausalLM"
    notes = "fused projections, Phi-4 too; without longrope; rows no longer than its sliding window"
    windowed = True
    rotated = 1.0
    used = LlamaLike.used | {"original_max_position_embeddings"}
    fixed = {
        **LlamaLike.fixed,
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "resid_pdrop": (None, 0.0),
    }
    irrelevant = {"embd_pdrop": "no longer read by transformers"}
    defaults = {**LlamaLike.defaults, "rms_norm_eps": 1e-5}

    def qkv(self, shape: Shape, attention: str) -> tuple[Rule, ...]:
        """Return the rules of the qkv projection."""
        return rules.fused_qkv(shape, attention + "qkv_proj.")

    def mlp(self, shape: Shape, layer: str, norm: str) -> tuple[Rule, ...]:
        """Return the rules of a layer's MLP and of the ``norm`` in front of it."""
        return (
            *rules.norm(shape, rules.FC1_NORM, norm),
            *rules.fused_fc1(shape, layer + "mlp.gate_up_proj."),
            *rules.fc2(shape, layer + "mlp.down_proj."),
        )
