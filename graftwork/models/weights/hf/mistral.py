"""Mistral: LLaMA's layers, with a sliding window that the context must not exceed."""

from graftwork.models.weights.hf.llama_like import LlamaLike


class Mistral(LlamaLike):
    """LLaMA without biases; transformers' default is a sliding window of 4096 tokens."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    notes = "rows no longer than its sliding window"
    windowed = True
    fixed = {**LlamaLike.fixed, "attention_bias": (None, False), "mlp_bias": (None, False)}
    defaults = {**LlamaLike.defaults, "num_key_value_heads": 8, "sliding_window": 4096}
