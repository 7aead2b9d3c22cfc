"""LLaMA and what is published under its name: SmolLM2, and many others."""

from graftwork.models.shape import Shape
from graftwork.models.weights.hf.family import Config
from graftwork.models.weights.hf.llama_like import LlamaLike, write_linear_bias


class Llama(LlamaLike):
    """RMSNorm, SwiGLU, rotary positions (LLaMA 3's frequency scaling too), biases everywhere or nowhere."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    notes = "LLaMA 1, 2, 3, 3.1 (its rope scaling), SmolLM2; grouped queries, tied embeddings, biases"

    def write(self, shape: Shape) -> Config:
        """Return the config fields, biases said aloud."""
        return {**super().write(shape), **write_linear_bias(shape)}
