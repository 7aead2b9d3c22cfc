"""Mixtral: Mistral's layers, their MLP a mixture of experts whose weights add up to 1."""

from graftwork.models.weights.hf.mixture_like import MixtureLike


class Mixtral(MixtureLike):
    """Softmax over the logits of the chosen experts, which is transformers' softmax over all, renormalised."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    notes = "mixture of experts; rows no longer than its sliding window"
    windowed = True
    count = "num_local_experts"
    block = "block_sparse_moe."
    linears = ("w1", "w3", "w2")
    rotary_base = 1e6
    aliases = {"num_experts": "num_local_experts"}
    used = MixtureLike.used | {"num_local_experts", "num_experts_per_tok"}
    fixed = {
        **MixtureLike.fixed,
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "router_jitter_noise": (None, 0.0),
    }
    defaults = {
        **MixtureLike.defaults,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
