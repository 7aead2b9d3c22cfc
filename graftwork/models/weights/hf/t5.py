"""T5 1.0 and 1.1, and what is published under its name: Flan-T5, ByT5-like variants, T5-efficient."""

from graftwork.models.shape import Shape
from graftwork.models.weights.hf.family import Config, ShapeFields, flag
from graftwork.models.weights.hf.t5_like import T5Like, is_t5


class T5(T5Like):
    """With tied embeddings (1.0) the decoder's output is scaled before the output layer, unless the config says no."""

    name = "t5"
    architecture = "T5ForConditionalGeneration"
    earlier = ("T5WithLMHeadModel",)
    notes = "T5 1.0 (ReLU, tied and scaled output), 1.1 and Flan-T5 (gated GELU, untied); encoder-decoder"
    defaults = {**T5Like.defaults, "feed_forward_proj": "relu"}

    def read(self, config: Config) -> ShapeFields:
        """Return the Shape fields; ``scale_decoder_outputs`` is what transformers writes since version 5."""
        fields = super().read(config)
        return {**fields, "scale_output": flag(config, "scale_decoder_outputs", fields["tie_embeddings"])}

    def write(self, shape: Shape) -> Config:
        """Return the config fields, the scale said aloud."""
        assert is_t5(shape)
        return {**super().write(shape), "scale_decoder_outputs": shape.scale_output}
